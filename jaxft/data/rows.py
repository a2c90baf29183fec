"""Rows out of text files: CSV, TSV, JSON Lines and plain lines, each perhaps gzipped, one row in memory at a time.

Files are read as bytes, split at ``\\n`` and decoded line by line, so that every problem can be given with its line.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from jaxft.errors import UserError, nearest

Value = str | int | float | bool | None

# Of decoded text. Closing one closes its file.
_Lines = Generator[str, None, None]

# Characters. The standard limit (131,072) refuses long documents; no limit at all would let one forgotten quote pull
# the whole rest of a file into memory.
_CSV_FIELD_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """The wanted values of one row, and where it starts (``file.csv:17``, ``file.parquet row 5``)."""

    values: tuple[Value, ...]
    where: str


def column_positions(present: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """Where each wanted column stands among those present.

    Raises:
      UserError: a wanted column is not there, or is there twice.
    """
    for name in wanted:
        if name not in present:
            raise missing_column(name, present, where)
        if present.count(name) > 1:
            raise UserError(f"{where}: column {name!r} is there {present.count(name)} times; rename all but one")
    return [present.index(name) for name in wanted]


def missing_column(name: str, present: Sequence[str], where: str) -> UserError:
    """The error that names the nearest column and the config keys that choose columns."""
    # Unnamed columns (pandas writes one for its index) cannot be chosen.
    named = [column for column in present if column]
    hint = nearest(name, named)
    if hint.startswith("did you mean"):
        hint += f" (columns: {', '.join(named)})"
    return UserError(f"{where}: no column {name!r}: {hint}; set data.text / data.label to one of these")


def iter_csv(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a CSV file with a header line, in the dialect of RFC 4180: quotes doubled, newlines allowed in quotes."""
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))
    return _iter_table(path, columns, _csv_cells)


def iter_tsv(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a tab-separated file with a header line. Quotes are ordinary characters, as in the files of GLUE."""
    return _iter_table(path, columns, _tsv_cells)


def iter_jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a file with one JSON object per line."""
    blank = 0
    with closing(_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                blank = blank or number
                continue
            _refuse_blank(path, blank)
            record = _json_object(line, where)
            for name in columns:
                if name not in record:
                    raise missing_column(name, list(record), where)
            yield Row(tuple(_json_value(record[name], name, where) for name in columns), where)


def iter_txt(path: Path | None, columns: tuple[str, ...]) -> Iterator[Row]:
    """One text per line, blank lines included; None reads standard input.

    Raises:
      UserError: more than one column is wanted.
    """
    where = "stdin" if path is None else str(path)
    if len(columns) != 1:
        wanted = ", ".join(map(repr, columns))
        raise UserError(f"{where}: plain lines hold one text each, but columns {wanted} are wanted; use .csv or .jsonl")
    return _iter_lines(_lines(path) if path else _decoded(sys.stdin.buffer, where), where)


def _iter_lines(lines: _Lines, where: str) -> Iterator[Row]:
    with closing(lines):
        for number, line in enumerate(lines, start=1):
            yield Row((_without_newline(line),), f"{where}:{number}")


# Pairs of the line where a row starts and its cells; a blank line has none.
_Cells = Generator[tuple[int, list[str]], None, None]


def _iter_table(path: Path, columns: tuple[str, ...], parse: Callable[[Path], _Cells]) -> Iterator[Row]:
    with closing(parse(path)) as cells_of_rows:
        yield from _rows_of_cells(path, columns, cells_of_rows)


def _rows_of_cells(path: Path, columns: tuple[str, ...], cells_of_rows: _Cells) -> Iterator[Row]:
    number, header = next(cells_of_rows, (1, []))
    where = f"{path}:{number}"
    if not any(name.strip() for name in header):
        raise UserError(f"{where}: there is no header; the first line must name the columns")
    for name in header:
        if name and header.count(name) > 1:
            raise UserError(f"{where}: the header names column {name!r} {header.count(name)} times; rename all but one")
    positions = column_positions(header, columns, where)
    blank = 0
    for number, cells in cells_of_rows:
        if not cells:
            blank = blank or number
            continue
        _refuse_blank(path, blank)
        if len(cells) != len(header):
            raise UserError(
                f"{path}:{number}: expected {len(header)} cells as in the header, found {len(cells)}; "
                "correct the row (a separator or quote inside a text?)"
            )
        yield Row(tuple(cells[position] for position in positions), f"{path}:{number}")


def _csv_cells(path: Path) -> _Cells:
    with closing(_lines(path)) as lines:
        reader = csv.reader(lines, strict=True)
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{path}:{start}: not valid CSV: {_explained(error)}") from error
            yield start, cells


def _explained(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end of data" in text or "field limit" in text:
        return f"a quote opened in this row is never closed ({text})"
    if "new-line character" in text:
        return "a carriage return outside quotes; end lines with \\n or \\r\\n"
    return f"{text}; a quote inside a quoted text must be doubled"


def _tsv_cells(path: Path) -> _Cells:
    with closing(_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            text = _without_newline(line)
            yield number, text.split("\t") if text else []


def _refuse_blank(path: Path, number: int) -> None:
    if number:
        raise UserError(f"{path}:{number}: a blank line before the end of the file; remove it or fill in the row")


def _without_newline(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _json_object(line: str, where: str) -> dict[str, object]:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from error
    except ValueError as error:  # also a number of more than 4300 digits
        problem, column = getattr(error, "msg", str(error)), getattr(error, "colno", 1)
        raise UserError(f"{where}:{column}: not valid JSON: {problem}; each line must hold one whole object") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected a JSON object such as {{"text": ...}}, found a {type(record).__name__}')
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _json_value(value: object, name: str, where: str) -> Value:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            # JSON can spell what no Unicode text can hold; tokenizers refuse it much later and less clearly.
            raise UserError(f"{where}: column {name!r} holds half of a \\u surrogate pair; correct the text") from error
    return plain_value(value, name, where)


def plain_value(value: object, name: str, where: str) -> Value:
    """``value`` if it is a string, number, boolean or None; UTF-8 bytes become a string.

    Raises:
      UserError: anything else.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: column {name!r} is not valid UTF-8: {error.reason}") from error
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise UserError(f"{where}: column {name!r} holds a {type(value).__name__}; expected a string, number or boolean")


def _lines(path: Path) -> _Lines:
    """The decoded lines of a file, line ends included, without a byte order mark. Whoever takes them closes them: else an error
    elsewhere would leave the file open for as long as its traceback lives."""
    gzipped = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if gzipped else open(path, "rb") as file:
            yield from _decoded(file, str(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip data ({error}); copy or compress the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decoded(file: IO[bytes] | gzip.GzipFile, where: str) -> _Lines:
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}:{number}: not valid UTF-8 (byte {error.start + 1} of the line: {error.reason}); "
                "save the file as UTF-8"
            ) from error
        yield line.removeprefix("\ufeff") if number == 1 else line
