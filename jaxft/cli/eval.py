"""``jaxft eval``: score a model on labelled rows."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from jaxft.tasks.contract import Judging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", help="exported folder, run folder, checkpoint or hub id")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="data.eval=my.csv, data.text=..., eval.batch_size=..."
    )
    parser.add_argument("--out", help="folder for metrics.json and confusion.png")
    parser.add_argument(
        "--rows", metavar="FILE", help="write each row's label, prediction and probability: .csv, .tsv or .jsonl"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="of two labels: the second where its probability is at least this (default: the likelier)",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the metrics of the task that the model's head is for."""
    from jaxft.errors import UserError
    from jaxft.machine.platform import set_up_jax

    set_up_jax("~/.cache/jaxft/xla")
    import numpy as np

    from jaxft import tasks
    from jaxft.data.encode import read_rows
    from jaxft.data.examples import make_split
    from jaxft.data.lengths import counted
    from jaxft.data.loader import Batches, make_buckets, stream
    from jaxft.inference.predict import open_model
    from jaxft.reporting.plots import lacking
    from jaxft.reporting.report import report_text, write_report
    from jaxft.training.rows import cached, open_held_out, refuse_other_labels
    from jaxft.training.setup import settled
    from jaxft.training.step import make_eval_step

    served = open_model(options.model, options.overrides, _say)
    module, task = served.task(threshold=options.threshold)
    config, tokenizer, labels = settled(served.config_for(module), module), served.tokenizer, served.labels
    if options.rows and not hasattr(task, "judged"):
        raise UserError(f"--rows: there is nothing to say of each row of {served.model.head}; leave it out")
    if config.data.eval is None:
        raise UserError("data.eval is not set; name the labelled rows, for instance data.eval=my.csv")
    refuse_other_labels(config.data.labels, labels, "the model's labels are")
    cache = cached("data.eval", config.data.eval)
    if cache is not None and options.rows:
        raise UserError(
            f"--rows: data.eval={cache} is a token cache, which holds no texts; name the rows, or leave it out"
        )
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    if getattr(config.task, "class_weights", "none") == "balanced":
        _say("the loss is unweighted: task.class_weights=balanced would need the training rows")
    rows = read_rows(config.data.eval, config.data, module.columns(config), _say) if cache is None else []
    if cache is None:
        encoded = module.encode(rows, tokenizer, tasks.Targets(labels), config)
        split, count = make_split("eval", encoded, module.fields(config, tokenizer.pad_id)), len(rows)
    else:
        split = open_held_out(cache, config, module, tokenizer, labels, "the model has")
        count = split.rows
    served.devices.check_batch("eval.batch_size", config.eval.batch_size)
    step = served.devices.compiled(make_eval_step(served.model, task), split.fields)
    longest = (tokenizer.max_length or config.data.max_length) * tasks.texts_of_row(config.task)
    buckets = make_buckets(None, longest)
    batches = Batches(split, config.eval.batch_size, buckets, None)
    parts = (
        step(served.params, batch) for batch in stream(batches, 0, batches.steps_per_epoch, config.data.read_ahead)
    )
    sums, outputs = tasks.collected(parts)
    metrics = tasks.scores(task, sums, outputs, rows)
    print(f"eval: {counted(len(split), count)}, {split.truncated} truncated to {tokenizer.max_length} tokens")
    for line in tasks.remarks(task, split):
        print(line)
    print(report_text(metrics, labels, [], min(shutil.get_terminal_size((100, 24)).columns, 120)))
    if options.rows:
        order = np.concatenate([batches.rows_of(step) for step in range(batches.steps_per_epoch)])
        write_rows(Path(options.rows), cast("Judging", task).judged(outputs, [row.values for row in rows], order))
        print(f"wrote {options.rows}")
    if options.out:
        for path in write_report(Path(options.out), metrics, labels, []):
            print(f"wrote {path}")
        if "confusion" in metrics and (why := lacking()) is not None:
            print(why)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def write_rows(target: Path, judged: Iterable[Mapping[str, object]]) -> None:
    """Writes one line per row, as a task judged it.

    Raises:
      UserError: ``target`` cannot be written.
    """
    from jaxft.data.sources.write import row_writer
    from jaxft.files import file_written_whole

    with file_written_whole(target) as file:
        write = row_writer(str(target), file)
        for row in judged:
            write(dict(row))
