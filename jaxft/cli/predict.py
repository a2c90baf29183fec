"""``jaxft predict``: text, file or standard input in, one JSON object per text out, in the same order, streaming."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import IO, TYPE_CHECKING

from jaxft.cli.console import THRESHOLD_HELP, threshold

if TYPE_CHECKING:
    from jaxft.data.sources.rows import Value
    from jaxft.inference.predict import Answers, Served
    from jaxft.tasks.contract import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", help="exported folder, run folder, checkpoint or hub id")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT|key=value",
        help="a .csv .tsv .jsonl .parquet .txt file (data.text, data.image name the column), - for standard input (a text per line), or "
        "images and folders of them; "
        "and overrides such as data.text=review data.max_length=256",
    )
    parser.add_argument("--text", action="append", default=[], help="a text; may be given several times")
    parser.add_argument("--pair", action="append", default=[], help="the second text of a pair, once per --text")
    parser.add_argument(
        "--out",
        help="write here instead of to standard output: .csv and .tsv as a table with the input's columns, else JSON Lines",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="texts computed at once (default: 32)")
    parser.add_argument(
        "--top", type=int, help="only the TOP most probable labels, or the TOP best answers to a question (JSON Lines)"
    )
    parser.add_argument(
        "--threshold",
        type=threshold,
        help=THRESHOLD_HELP,
    )


def run(options: argparse.Namespace) -> int:
    """Writes a text's label and probabilities, with the other columns of its row; ``true`` is the label that the row has."""
    from pathlib import Path

    from jaxft.config.ranges import MOST_ROWS
    from jaxft.data.sources.media import is_media
    from jaxft.data.sources.write import is_table
    from jaxft.errors import UserError
    from jaxft.files import file_written_whole
    from jaxft.machine import compile_cache
    from jaxft.machine.platform import set_up_jax

    inputs = [item for item in options.inputs if "=" not in item or Path(item).exists()]
    overrides = [item for item in options.inputs if item not in inputs]
    if inputs and " " in inputs[0] and not Path(inputs[0]).exists():
        raise UserError(f"there is no file {inputs[0]!r}; to give a text on the command line: --text {inputs[0]!r}")
    several = len(inputs) > 1 and not all(is_media(item) or Path(item).is_dir() for item in inputs)
    if bool(inputs) == bool(options.text) or several:
        raise UserError(
            "give one INPUT (a file, or - for standard input), several images or folders of them, or --text"
        )
    if options.pair and len(options.pair) != len(options.text):
        raise UserError(f"{len(options.text)} --text and {len(options.pair)} --pair: give one --pair for each --text")
    if options.batch_size < 1 or (options.top is not None and options.top < 1):
        raise UserError("--batch-size and --top must be at least 1")
    if options.batch_size > MOST_ROWS:
        raise UserError(f"--batch-size {options.batch_size}: must be at most {MOST_ROWS}")
    if options.top is not None and is_table(options.out):
        raise UserError(f"--top is for JSON Lines; {options.out} has a column for each of few labels")
    set_up_jax(compile_cache.FOLDER)
    from jaxft.inference.predict import make_answerer, open_model

    served = open_model(options.model, overrides, lambda text: print(text, file=sys.stderr))
    answers = make_answerer(served, options.batch_size, threshold=options.threshold, top=options.top)
    if options.text and served.model.facts.processor != "text":
        raise UserError(f"--text: {options.model} reads no texts but {served.model.facts.processor}s; name files")
    rows = _rows_of(tuple(inputs), served) if inputs else _texts(options.text, options.pair)
    if options.out:
        with file_written_whole(Path(options.out)) as file:
            counts = _answer(rows, answers, served, options, file)
    else:
        counts = _answer(rows, answers, served, options, sys.stdout)
    if counts.cut:
        limit = served.tokenizer.max_length
        print(
            f"{counts.cut} of {counts.rows} texts were truncated to {limit} tokens (data.max_length)", file=sys.stderr
        )
    if counts.unsaid:
        print(
            f"{counts.unsaid} of {counts.rows} texts have no label: the model's probabilities are NaN", file=sys.stderr
        )
    return 0


@dataclass
class _Counts:
    rows: int = 0
    cut: int = 0
    """Texts that were truncated."""
    unsaid: int = 0
    """Texts that the model gives no number for."""


@dataclass(frozen=True)
class _Input:
    texts: tuple[Value, ...]
    """A text, or a pair; or the words of a text."""
    columns: Mapping[str, object]
    """The whole row, by column; empty if the input has no columns."""
    names: tuple[str, ...] = ("text", "pair")
    """The columns of the texts."""
    where: str = "--text"
    """Where the row is, for messages."""


def _texts(texts: list[str], pairs: list[str]) -> Iterator[_Input]:
    from jaxft.errors import UserError

    for text in (*texts, *pairs):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError("--text or --pair is not valid UTF-8; correct it, or give a file in UTF-8")
    yield from map(_Input, zip(texts, pairs, strict=True) if pairs else ((text,) for text in texts), repeat({}))


def _rows_of(references: tuple[str, ...], served: Served) -> Iterator[_Input]:
    from jaxft.data.row_rules import check_texts, is_broken
    from jaxft.data.sources.read import column_names, form_of, iter_rows
    from jaxft.data.sources.rows import Carried

    data = served.config.data
    form = form_of(data, lambda text: print(text, file=sys.stderr))
    wanted = [column for column in served.task()[0].columns(served.config_for(served.task()[0])) if column.is_text]
    media = [i for i, column in enumerate(wanted) if column.kind in ("image", "sound")]
    names = column_names(references[0], wanted[0].wanted if media else data.text, form)
    wanted = wanted if names else wanted[:1]  # plain lines hold one text each
    columns = tuple(column.name for column in wanted)
    others = [Carried(name) for name in names if name not in columns]
    reference, broken = references[0] if len(references) == 1 else references, 0
    for row in iter_rows(reference, (*(column.wanted for column in wanted), *others), form):
        check_texts(row, wanted)
        if data.broken_files == "skip" and any(is_broken(row.values[i], wanted[i].kind, row.where) for i in media):
            broken += 1
            continue
        # What a file holds is not said again.
        said = [row.where if isinstance(value, bytes) else value for value in row.values]
        values = dict(zip((*columns, *others), said, strict=True))
        texts, called = row.values[: len(columns)], columns if names or media else ("text", "pair")
        yield _Input(texts, {name: values[name] for name in names}, called, row.where)
    if broken:
        print(f"{broken} files cannot be read and are left out", file=sys.stderr)


def _answer(
    rows: Iterator[_Input], answers: Answers, served: Served, options: argparse.Namespace, file: IO[str]
) -> _Counts:
    """Writes the answers."""
    from jaxft.data.sources.rows import Row
    from jaxft.data.sources.write import is_table, row_writer
    from jaxft.files import is_unicode
    from jaxft.inference.chunks import chunks

    counts, table = _Counts(), is_table(options.out)
    write = row_writer(options.out, file, ascii_only=not is_unicode(file))
    # Several batches at a time, so that texts of similar length can share one.
    for chunk in chunks(rows, 16 * options.batch_size):
        made = answers([Row(row.texts, row.where) for row in chunk])
        for row, (answer, cut) in zip(chunk, made, strict=True):
            write(_table_row(row, answer) if table else _record(row, answer, served))
            counts.rows += 1
            counts.cut += cut
            counts.unsaid += answer.unsaid
        file.flush()
    return counts


def _table_row(row: _Input, answer: Answer) -> dict[str, object]:
    """The row's columns, then what is said of it."""
    given = row.columns or dict(zip(row.names, row.texts, strict=False))
    given = {name: row.where if isinstance(value, bytes) else value for name, value in given.items()}
    given = {name: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for name, v in given.items()}
    return {**_beside(given, answer.cells), **answer.cells}


def _beside(given: Mapping[str, object], said: Iterable[str]) -> dict[str, object]:
    """The columns of the input under names that the answer does not use."""
    taken, renamed = set(said), {}
    for name, value in given.items():
        while name in taken:
            name = f"input_{name}"
        taken.add(name)
        renamed[name] = value
    return renamed


def _record(row: _Input, answer: Answer, served: Served) -> dict[str, object]:
    """One JSON object: what is said of the row, its label if it has one, and its other columns."""
    image = served.model.facts.processor == "image"
    first = row.where if isinstance(row.texts[0], bytes) else row.texts[0]
    said = {
        "image" if image else "text": first,
        **({"pair": row.texts[1]} if len(row.texts) == 2 else {}),
        **answer.record,
    }
    label = served.config.data.label
    if label in row.columns:
        said["true"] = _as_given(row.columns[label])
    rest = {name: value for name, value in row.columns.items() if name not in (*row.names, label)}
    return said | _finite(_beside(rest, said))


def _as_given(true: object) -> object:
    """The label that a row has: a name, or the list or mapping that was carried along as JSON; None: it has none."""
    from jaxft.data.labels import label_text

    if isinstance(true, str) and true[:1] in ("[", "{"):
        with suppress(ValueError):
            return json.loads(true)
    return label_text(true) or None


def _finite(row: Mapping[str, object]) -> dict[str, object]:
    """The same with null for each NaN and infinity, which JSON does not have."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
