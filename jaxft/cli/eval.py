"""``jaxft eval``: score a model on labelled rows."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from jaxft.cli.console import THRESHOLD_HELP, threshold

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from jaxft.config import RunConfig
    from jaxft.data.cache import Cache
    from jaxft.data.examples import Split
    from jaxft.data.processors.contract import Processor
    from jaxft.data.sources.rows import Row
    from jaxft.inference.predict import Served
    from jaxft.tasks.contract import Arrays, Exhaustive, Judging, Task, TaskModule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", help="exported folder, run folder, checkpoint or hub id")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="data.eval=my.csv, data.text=..., eval.batch_size=..."
    )
    parser.add_argument(
        "--split",
        choices=("eval", "test"),
        default="eval",
        help="the rows of data.eval (default) or data.test; of a run, without these, those that it held out",
    )
    parser.add_argument(
        "--out", help="folder for metrics.json, confusion.png and errors.csv (of a test: metrics_test.json ...)"
    )
    parser.add_argument(
        "--rows", metavar="FILE", help="write each row's label, prediction and probability: .csv, .tsv or .jsonl"
    )
    parser.add_argument(
        "--threshold",
        type=threshold,
        help=THRESHOLD_HELP,
    )


def run(options: argparse.Namespace) -> int:
    """Prints the metrics of the task that the model's head is for."""
    from jaxft.machine import compile_cache
    from jaxft.machine.platform import set_up_jax

    set_up_jax(compile_cache.FOLDER)
    from jaxft.inference.corpus_scores import check_task
    from jaxft.inference.predict import open_model
    from jaxft.training.corpora import corpora

    served = open_model(options.model, options.overrides, _say)
    module, task = served.task(threshold=options.threshold)
    key = f"data.{options.split}"
    if folders := corpora(key, getattr(served.config.data, options.split)):
        return _score_corpora(options, served, check_task(task, served.model.head, f"{key}={folders[0]}"), folders)
    held_out = _held_out(options, served, module, task)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    scored = _scored(served, module, task, held_out)
    _tell(served, task, held_out, scored)
    _write(options, served, task, held_out, scored)
    return 0


class _HeldOut(NamedTuple):
    """The rows that a model is scored on."""

    name: str
    config: RunConfig
    split: Split
    count: int
    rows: list[Row]
    """The rows as they were read; none, if they come from a token cache."""


class _Scored(NamedTuple):
    """What a model makes of them."""

    metrics: Mapping[str, object]
    outputs: Arrays
    order: np.ndarray
    """The number of the row of each output."""


def _held_out(options: argparse.Namespace, served: Served, module: TaskModule, task: Task) -> _HeldOut:
    from jaxft import tasks
    from jaxft.data.cache import Cache
    from jaxft.data.examples import make_split
    from jaxft.errors import UserError
    from jaxft.training.rows import refuse_other_labels
    from jaxft.training.setup import settled

    config, processor, labels = settled(served.config_for(module), module), served.processor, served.labels
    if options.rows and not (hasattr(task, "judged") and getattr(task, "judging", True)):
        raise UserError(f"--rows: there is nothing to say of each row of {served.model.head}; leave it out")
    name = options.split
    refuse_other_labels(config.data.labels, labels, "the model's labels are")
    found = _rows(name, config, module, processor, labels)
    if isinstance(found, Cache) and options.rows:
        raise UserError(
            f"--rows: data.{name}={found.folder} is a token cache, which holds no texts; name the rows, or leave it out"
        )
    if getattr(config.task, "class_weights", "none") == "balanced":
        _say("the loss is unweighted: task.class_weights=balanced would need the training rows")
    if isinstance(found, Cache):
        return _HeldOut(name, config, found, found.rows, [])
    encoded = module.encode(found, processor, tasks.Targets(labels), config)
    stored = tasks.stored_fields(module, config, processor)
    return _HeldOut(name, config, make_split(name, encoded, stored), len(found), found)


def _scored(served: Served, module: TaskModule, task: Task, held_out: _HeldOut) -> _Scored:
    import numpy as np

    from jaxft import tasks
    from jaxft.data.loader import Batches, make_buckets, stream
    from jaxft.training.step import make_eval_step

    config, processor = held_out.config, served.processor
    served.devices.check_batch("eval.batch_size", config.eval.batch_size)
    longest = (processor.max_length or config.data.max_length) * tasks.texts_of_row(config.task)
    rendering = tasks.rendering_of(module, config, processor)
    batches = Batches(held_out.split, config.eval.batch_size, make_buckets(None, longest), None, rendering=rendering)
    step = served.devices.compiled(make_eval_step(served.model, task), batches.fields)
    count = batches.steps_per_epoch
    parts = (step(served.params, batch) for batch in stream(batches, 0, count, config.data.read_ahead))
    sums, outputs = tasks.collected(parts)
    scores = tasks.scores(task, sums, outputs, held_out.rows)
    metrics = tasks.reported(task, scores, outputs, test=held_out.name == "test")
    return _Scored(metrics, outputs, np.concatenate([batches.rows_of(step) for step in range(count)]))


def _tell(served: Served, task: Task, held_out: _HeldOut, scored: _Scored) -> None:
    from jaxft import tasks
    from jaxft.data.lengths import counted
    from jaxft.data.rendering import has_lengths
    from jaxft.reporting.report import report_text

    split = held_out.split
    cut = f", {split.truncated} truncated to {served.processor.max_length} tokens" if has_lengths(split) else ""
    print(f"{held_out.name}: {counted(len(split), held_out.count)}{cut}")
    for line in tasks.remarks(task, split):
        print(line)
    print(report_text(scored.metrics, served.labels, [], _width()))


def _write(options: argparse.Namespace, served: Served, task: Task, held_out: _HeldOut, scored: _Scored) -> None:
    from jaxft.cli.row_files import write_errors, write_rows
    from jaxft.reporting.plots import lacking
    from jaxft.reporting.report import write_report

    rows, name = held_out.rows, held_out.name
    if options.rows:
        judged = cast("Judging", task).judged(scored.outputs, [row.values for row in rows], scored.order)
        write_rows(Path(options.rows), judged)
        print(f"wrote {options.rows}")
    if options.out:
        for path in write_report(Path(options.out), scored.metrics, served.labels, [], split=name):
            print(f"wrote {path}")
        for line in write_errors(Path(options.out), task, scored.outputs, rows, scored.order, split=name):
            print(line)
        if "confusion" in scored.metrics and (why := lacking()) is not None:
            print(why)


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def _score_corpora(options: argparse.Namespace, served: Served, task: Exhaustive, folders: list[Path]) -> int:
    """Prints the scores of whole corpora, each token once."""
    from jaxft.errors import UserError
    from jaxft.inference.corpus_scores import score_corpora
    from jaxft.reporting.report import report_text, write_report

    if options.rows:
        raise UserError(
            f"--rows: data.{options.split}={folders[0]} is a corpus, which has no labelled rows; leave it out"
        )
    total, metrics = score_corpora(served, task, folders)
    documents, tokens, scored = total.documents, total.tokens, total.scored
    print(f"{options.split}: {documents:,} documents, {tokens:,} tokens, {scored:,} of them scored, each once")
    if scored < tokens:
        print("tokens that are not scored: special ones, and first ones that no token comes before")
    print(report_text(metrics, (), [], _width()))
    if options.out:
        for path in write_report(Path(options.out), metrics, (), [], split=options.split):
            print(f"wrote {path}")
    return 0


def _rows(
    name: str, config: RunConfig, module: TaskModule, processor: Processor, labels: tuple[str, ...]
) -> list[Row] | Cache:
    """The rows of a split: those that are named, or those that a run held out of its training rows.

    Raises:
      UserError: there are none.
    """
    from jaxft.data.encode import read_rows
    from jaxft.errors import UserError
    from jaxft.training.rows import cached, divided, rows_of_split, shares_of

    data = config.data
    if getattr(data, name) is not None:
        return rows_of_split(name, config, module, processor, labels, _say, others="the model has")
    if data.train is None or f"data.{name}_fraction" not in shares_of(data):
        hint = " (or data.test_fraction, of a run that held them out)" if name == "test" else ""
        raise UserError(f"data.{name} is not set; name the labelled rows, for instance data.{name}=my.csv{hint}")
    if cached("data.train", data.train) is not None:
        raise UserError(f"data.{name} is not set, and data.train={data.train} is a token cache; name the labelled rows")
    rows = read_rows(data.train, data, module.columns(config), _say, grouped=True)
    return divided(rows, config, module, _say)[1][name]


def _say(text: str) -> None:
    print(text, file=sys.stderr)
