"""``jaxft eval``: score a model on labelled rows."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
    from jaxft.commands.platform import set_up_jax
    from jaxft.errors import UserError, listed

    set_up_jax("~/.cache/jaxft/xla")
    import jax
    import numpy as np

    from jaxft import tasks
    from jaxft.data.encode import encode_rows, read_rows
    from jaxft.data.labels import declared_labels, label_text
    from jaxft.data.loader import Batches, make_buckets, stream
    from jaxft.plots import lacking
    from jaxft.report import report_text, write_report
    from jaxft.serving import check_threshold, open_model
    from jaxft.step import make_eval_step

    served = open_model(options.model, options.overrides, lambda text: print(text, file=sys.stderr))
    config = served.config
    module = tasks.task_of_head(served.model.head, served.config.task.name)
    if module is None:
        raise UserError(
            f"the model has no head that a task scores (found: {served.model.head}): fine-tune it first (jaxft train)"
        )
    if not module.LABELLED and (options.rows or options.threshold is not None):
        raise UserError("--rows and --threshold are for tasks whose rows have labels")
    served.refuse_other_problems("eval")
    check_threshold(options.threshold, served.labels)
    if config.data.eval is None:
        raise UserError("data.eval is not set; name the labelled rows, for instance data.eval=my.csv")
    declared, renamed = declared_labels(config.data.labels)
    if module.LABELLED and declared and declared != tuple(map(label_text, served.labels)):
        raise UserError(
            f"data.labels=[{listed(map(repr, declared))}]: the model's labels are [{listed(map(repr, served.labels))}]; leave it out"
        )
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    if config.task.class_weights == "balanced":
        print("the loss is unweighted: task.class_weights=balanced would need the training rows", file=sys.stderr)
    rows = read_rows(
        config.data.eval, config.data, labelled=module.LABELLED, note=lambda text: print(text, file=sys.stderr)
    )
    labels = served.labels if module.LABELLED else ()
    in_parts = config.data.long_texts == "split" and not module.LABELLED
    split = encode_rows(
        "eval",
        rows,
        labels if module.LABELLED else None,
        served.tokenizer,
        renamed=dict(zip(renamed, (served.labels[declared.index(name)] for name in renamed.values()), strict=True)),
        split=in_parts,
        end_id=served.tokenizer.end_id if module.END_TOKEN else None,
    )
    task = module.make_task(config.task, labels, (1,) * len(labels), served.tokenizer)
    if options.threshold is not None:
        task = dataclasses.replace(task, threshold=options.threshold)
    step = jax.jit(make_eval_step(served.model, task))
    buckets = make_buckets(None, served.tokenizer.max_length or config.data.max_length)
    batches = Batches(split, config.eval.batch_size, buckets, served.tokenizer.pad_id, None)
    parts = (
        step(served.params, batch) for batch in stream(batches, 0, batches.steps_per_epoch, config.data.read_ahead)
    )
    sums, outputs = tasks.collected(parts)
    metrics = task.score(sums, outputs)
    print(f"eval: {len(split)} rows, {split.truncated} truncated to {served.tokenizer.max_length} tokens")
    print(report_text(metrics, labels, [], min(shutil.get_terminal_size((100, 24)).columns, 120)))
    if options.rows:
        order = np.concatenate([batches.rows_of(step) for step in range(batches.steps_per_epoch)])
        write_rows(
            Path(options.rows), rows, labels, {name: values[order.argsort()] for name, values in outputs.items()}
        )
        print(f"wrote {options.rows}")
    if options.out:
        for path in write_report(Path(options.out), metrics, labels, []):
            print(f"wrote {path}")
        if "confusion" in metrics and (why := lacking()) is not None:
            print(why)
    return 0


def write_rows(target: Path, rows: Sequence[Any], labels: Sequence[str], outputs: Mapping[str, Any]) -> None:
    """Writes one line per row: text, pair if there is one, true and predicted label, probability, and whether it is right.

    Args:
      rows: as they were read: (text, [pair,] label).
      outputs: of the task, in the order of the rows.

    Raises:
      UserError: ``target`` cannot be written.
    """
    from jaxft.data.write import row_writer
    from jaxft.files import file_written_whole

    with file_written_whole(target) as file:
        write = row_writer(str(target), file)
        found = (outputs[name].tolist() for name in ("labels", "predicted", "probability"))
        for row, true, predicted, probability in zip(rows, *found, strict=True):
            said = not math.isnan(probability)
            write(
                {
                    **dict(zip(("text", "pair"), row.values[:-1], strict=False)),
                    "true": labels[true],
                    "predicted": labels[predicted] if said else None,
                    "probability": round(probability, 6) if said else None,
                    "right": said and true == predicted,
                }
            )
