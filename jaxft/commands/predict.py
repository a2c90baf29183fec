"""``jaxft predict``: text, file or standard input in, one JSON object per text out, in the same order, streaming."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import IO, Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", help="exported folder, run folder, checkpoint or hub id")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT|key=value",
        help="a .csv .tsv .jsonl .parquet .txt file (data.text names the column), or - for standard input (a text per line); "
        "and overrides such as data.text=review data.max_length=256",
    )
    parser.add_argument("--text", action="append", default=[], help="a text; may be given several times")
    parser.add_argument("--pair", action="append", default=[], help="the second text of a pair, once per --text")
    parser.add_argument("--out", help="write here instead of to standard output")
    parser.add_argument("--batch-size", type=int, default=32, help="texts computed at once (default: 32)")
    parser.add_argument("--top", type=int, help="only the TOP most probable labels")


def run(options: argparse.Namespace) -> int:
    """Writes {"text", "label", "probability", "probabilities"} per text."""
    from pathlib import Path

    from jaxft.commands.train import set_up_jax
    from jaxft.errors import UserError
    from jaxft.files import file_written_whole

    inputs = [item for item in options.inputs if "=" not in item or Path(item).exists()]
    overrides = [item for item in options.inputs if item not in inputs]
    if inputs and " " in inputs[0] and not Path(inputs[0]).exists():
        raise UserError(f"there is no file {inputs[0]!r}; to give a text on the command line: --text {inputs[0]!r}")
    if bool(inputs) == bool(options.text) or len(inputs) > 1:
        raise UserError("give one INPUT (a file, or - for standard input) or --text")
    if options.pair and len(options.pair) != len(options.text):
        raise UserError(f"{len(options.text)} --text and {len(options.pair)} --pair: give one --pair for each --text")
    if options.batch_size < 1 or (options.top is not None and options.top < 1):
        raise UserError("--batch-size and --top must be at least 1")
    set_up_jax("~/.cache/jaxft/xla")
    from jaxft.serving import make_classifier, open_model

    served = open_model(options.model, overrides, lambda text: print(text, file=sys.stderr))
    classify = make_classifier(served, options.batch_size)
    rows = _rows_of(inputs[0], served.config.data) if inputs else _texts(options.text, options.pair)
    if options.out:
        with file_written_whole(Path(options.out)) as file:
            count, cut = _answer(rows, classify, served, options, file)
    else:
        count, cut = _answer(rows, classify, served, options, sys.stdout)
    if cut:
        limit = served.tokenizer.max_length
        print(f"{cut} of {count} texts were truncated to {limit} tokens (data.max_length)", file=sys.stderr)
    return 0


def _texts(texts: list[str], pairs: list[str]) -> Iterator[tuple[str, ...]]:
    from jaxft.errors import UserError

    for text in (*texts, *pairs):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError("--text or --pair is not valid UTF-8; correct it, or give a file in UTF-8")
    yield from zip(texts, pairs, strict=True) if pairs else ((text,) for text in texts)


def _rows_of(reference: str, data: Any) -> Iterator[tuple[str, ...]]:
    from jaxft.data.encode import check_texts
    from jaxft.data.sources import form_of, iter_rows

    lines = reference == "-" or reference.removesuffix(".gz").endswith(".txt")
    columns = (data.text,) if lines or data.text_pair is None else (data.text, data.text_pair)
    for row in iter_rows(reference, columns, form_of(data, lambda text: print(text, file=sys.stderr))):
        check_texts(row, columns)
        yield tuple(str(value) for value in row.values)


def _answer(
    rows: Iterator[tuple[str, ...]], classify: Any, served: Any, options: argparse.Namespace, file: IO[str]
) -> tuple[int, int]:
    """Writes the answers; returns (texts, truncated texts)."""
    from jaxft.serving import chunks

    count = cut = 0
    # Several batches at a time, so that texts of similar length can share one.
    for chunk in chunks(rows, 16 * options.batch_size):
        pairs = [row[1] for row in chunk] if len(chunk[0]) == 2 else None
        for row, answer in zip(chunk, classify([row[0] for row in chunk], pairs), strict=True):
            file.write(
                json.dumps(_record(row, answer.probabilities, served.labels, options.top), ensure_ascii=False) + "\n"
            )
            count += 1
            cut += answer.truncated
        file.flush()
    return count, cut


def _record(row: tuple[str, ...], probabilities: Any, labels: tuple[str, ...], top: int | None) -> dict[str, Any]:
    order = (-probabilities).argsort(kind="stable")[:top]
    best = order[0]
    return {
        "text": row[0],
        **({"pair": row[1]} if len(row) == 2 else {}),
        "label": labels[best],
        "probability": round(float(probabilities[best]), 6),
        "probabilities": {labels[i]: round(float(probabilities[i]), 6) for i in order},
    }
