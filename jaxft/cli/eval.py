"""``jaxft eval``: score a model on labelled rows."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jaxft.cli.console import THRESHOLD_HELP, threshold

if TYPE_CHECKING:
    from jaxft.config import RunConfig
    from jaxft.data.cache import Cache
    from jaxft.data.processors.contract import Processor
    from jaxft.data.sources.rows import Row
    from jaxft.inference.predict import Served
    from jaxft.tasks.contract import Exhaustive, Judging, TaskModule


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
    from jaxft.errors import UserError
    from jaxft.machine import compile_cache
    from jaxft.machine.platform import set_up_jax

    set_up_jax(compile_cache.FOLDER)
    import numpy as np

    from jaxft import tasks
    from jaxft.cli.row_files import write_errors, write_rows
    from jaxft.data.cache import Cache
    from jaxft.data.examples import make_split
    from jaxft.data.lengths import counted
    from jaxft.data.loader import Batches, make_buckets, stream
    from jaxft.data.rendering import has_lengths
    from jaxft.inference.corpus_scores import check_task
    from jaxft.inference.predict import open_model
    from jaxft.reporting.plots import lacking
    from jaxft.reporting.report import report_text, write_report
    from jaxft.training.corpora import corpora
    from jaxft.training.rows import refuse_other_labels
    from jaxft.training.setup import settled
    from jaxft.training.step import make_eval_step

    served = open_model(options.model, options.overrides, _say)
    module, task = served.task(threshold=options.threshold)
    key = f"data.{options.split}"
    if folders := corpora(key, getattr(served.config.data, options.split)):
        return _score_corpora(options, served, check_task(task, served.model.head, f"{key}={folders[0]}"), folders)
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
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    if getattr(config.task, "class_weights", "none") == "balanced":
        _say("the loss is unweighted: task.class_weights=balanced would need the training rows")
    if isinstance(found, Cache):
        split, count, rows = found, found.rows, []
    else:
        encoded = module.encode(found, processor, tasks.Targets(labels), config)
        stored = tasks.stored_fields(module, config, processor)
        split, count, rows = make_split(name, encoded, stored), len(found), found
    served.devices.check_batch("eval.batch_size", config.eval.batch_size)
    longest = (processor.max_length or config.data.max_length) * tasks.texts_of_row(config.task)
    buckets = make_buckets(None, longest)
    rendering = tasks.rendering_of(module, config, processor)
    batches = Batches(split, config.eval.batch_size, buckets, None, rendering=rendering)
    step = served.devices.compiled(make_eval_step(served.model, task), batches.fields)
    parts = (
        step(served.params, batch) for batch in stream(batches, 0, batches.steps_per_epoch, config.data.read_ahead)
    )
    sums, outputs = tasks.collected(parts)
    metrics = tasks.reported(task, tasks.scores(task, sums, outputs, rows), outputs, test=name == "test")
    cut = f", {split.truncated} truncated to {processor.max_length} tokens" if has_lengths(split) else ""
    print(f"{name}: {counted(len(split), count)}{cut}")
    for line in tasks.remarks(task, split):
        print(line)
    print(report_text(metrics, labels, [], min(shutil.get_terminal_size((100, 24)).columns, 120)))
    order = np.concatenate([batches.rows_of(step) for step in range(batches.steps_per_epoch)])
    if options.rows:
        write_rows(Path(options.rows), cast("Judging", task).judged(outputs, [row.values for row in rows], order))
        print(f"wrote {options.rows}")
    if options.out:
        for path in write_report(Path(options.out), metrics, labels, [], split=name):
            print(f"wrote {path}")
        for line in write_errors(Path(options.out), task, outputs, rows, order, split=name):
            print(line)
        if "confusion" in metrics and (why := lacking()) is not None:
            print(why)
    return 0


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
    print(report_text(metrics, (), [], min(shutil.get_terminal_size((100, 24)).columns, 120)))
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
