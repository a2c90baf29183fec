"""``jaxft data``: what a run's loader will see, before anything is trained; and, by a first word, corpora (:mod:`jaxft.cli.corpus`)."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from typing import TYPE_CHECKING

from jaxft.cli import corpus
from jaxft.cli.show_config import split_run_file
from jaxft.config import RunConfig, load_config
from jaxft.errors import UserError
from jaxft.machine.platform import set_up_jax

if TYPE_CHECKING:
    from jaxft.data.batch import Example
    from jaxft.data.examples import Split
    from jaxft.data.processors.tokenizer import Tokenizer
    from jaxft.tasks import Targets
    from jaxft.training.rows import Rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "run_file", nargs="?", help="YAML run file, as for jaxft train; or one of the words build, show, verify"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for instance data.train=my.csv; build: sources; show, verify: a corpus",
    )
    parser.add_argument("--rows", type=int, default=3, help="rows shown token by token, or documents (default: 3)")
    corpus.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Prints lengths, labels, duplicates and the first rows as tokens; no weights are read, nothing is written."""
    if options.rows < 0:
        raise UserError(f"--rows {options.rows}: must be at least 0")
    if options.run_file in corpus.WORDS:
        return corpus.run(options)
    corpus.refuse_options(options)
    config = load_config(*split_run_file(options.run_file, options.overrides))
    set_up_jax(None)
    from jaxft import tasks
    from jaxft.data.lengths import advice, counted, lengths_text
    from jaxft.data.processors.opened import as_text
    from jaxft.data.processors.tokenizer import Tokenizer
    from jaxft.data.rendering import has_lengths
    from jaxft.training.batch_shapes import buckets_of
    from jaxft.training.corpora import open_streams
    from jaxft.training.processors import processor_of
    from jaxft.training.recipe import open_start, planned_targets
    from jaxft.training.rows import open_rows
    from jaxft.training.setup import settled

    module = tasks.task(config.task.name)
    config = settled(config, module)
    source = open_start(config, _say)
    processor = processor_of(config, source)
    folder = processor.folder if source is None else source.folder
    config = dataclasses.replace(config, task=tasks.adopted(config.task, folder, _say))
    if (streams := open_streams(config, module, processor, print)) is not None:
        return corpus.show_rows(streams.train, as_text(processor), options.rows, config.train.seed)
    found = open_rows(config, module, processor, source, print)
    for split, rows in found.splits:
        texts = has_lengths(split)
        print(
            f"{split.name}: {lengths_text(split, config.data.max_length, rows) if texts else counted(len(split), rows)}"
        )
    facts, _ = planned_targets(config, source)
    for line in _labels(found):
        print(line)
    buckets = buckets_of(config)
    if has_lengths(found.train):
        _lengths(config, found.train, buckets)
        if tasks.texts_of_row(config.task) == 1 and (
            hint := advice(found.train, config.data.max_length, buckets, facts.limit)
        ):
            print(hint)
    _duplicates(found)
    task = module.make_task(config.task, found.targets, facts, processor)
    for split, _ in found.splits:
        for line in tasks.remarks(task, split):
            print(line)
    if isinstance(processor, Tokenizer):
        _rows(found, processor, options.rows)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _block() -> str:
    from jaxft.reporting.plots import shows_blocks

    return "█" if shows_blocks(sys.stdout) else "#"


def _labels(found: Rows) -> list[str]:
    from jaxft.reporting.data_text import label_lines, part_lines
    from jaxft.training.rows import counts_of

    train, targets = found.train, found.targets
    if not targets.labels:
        return []
    if not targets.counts:
        lines = [""]
        for split, _ in found.splits:
            numbers = split.columns["labels"]
            of = "" if split is train else f" ({split.name})"
            lines.append(
                f"{targets.labels[0]}{of}: {numbers.min():.4g} to {numbers.max():.4g}, mean {numbers.mean():.4g}"
            )
        return lines
    what = "words" if train.axis("labels") == "length" else "rows"
    lines = ["", f"labels of training {what}:", *label_lines(targets.labels, targets.counts, block=_block())]
    parts = {split.name: counts_of(split, targets.labels) for split, _ in found.splits}
    return [*lines, "", f"labels of {what} by split:", *part_lines(targets.labels, parts)]


def _lengths(config: RunConfig, train: Split, buckets: tuple[int, ...]) -> None:
    from jaxft.reporting.data_text import length_lines
    from jaxft.training.packing import padding_text

    print("\ntokens of training rows:")
    print("\n".join(length_lines(train.sizes("length"), buckets, block=_block())))
    print(padding_text(train, config))


def _duplicates(found: Rows) -> None:
    from jaxft.data.cache import Cache
    from jaxft.data.duplicates import duplicates, duplicates_text

    print()
    for split in (part.split for part in found.held_out):
        what = "held-out" if split.name == "eval" else split.name
        if isinstance(found.train, Cache) or isinstance(split, Cache):
            print(f"duplicates: {what} and training rows are not compared where they lie in a token cache")
            continue
        copies = duplicates(found.train, split)
        print(f"duplicates: {duplicates_text(copies, len(split), what)}")
        if len(copies.shared):
            pair = f"{what} example {copies.shared[0]} and training example {copies.twins[0]}"
            print(f"  for instance {pair}, counted from 0")


def _rows(found: Rows, tokenizer: Tokenizer, count: int) -> None:
    from jaxft.reporting.data_text import example_lines

    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for number in range(min(count, len(found.train))):
        example = found.train[number]
        about = _about(example, found.train, found.targets)
        print(f"\ntraining example {number}:")
        print("\n".join(example_lines(example, tokenizer.pieces(example["tokens"]), about, width)))


def _about(example: Example, train: Split, targets: Targets) -> dict[str, str]:
    """The label of an example, by its name."""
    from jaxft.data.packing import CLASSES

    if "labels" not in example or train.axis("labels") not in (None, CLASSES):
        return {}
    value = example["labels"]
    if train.axis("labels") == CLASSES:
        return {"labels": ", ".join(targets.labels[i] for i in value.nonzero()[0]) or "none"}
    if train.fields["labels"].dtype != "int32":
        return {targets.labels[0]: f"{float(value):g}"}
    return {"label": targets.labels[int(value)]}
