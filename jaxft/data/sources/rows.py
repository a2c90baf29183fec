"""Rows out of text files: JSON Lines and plain lines here, tables in ``table``; one row in memory at a time, each problem with its
line.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jaxft.data.sources.lines import Lines, decoded, read_lines
from jaxft.data.sources.media import media_value
from jaxft.errors import UserError, listed, nearest

Scalar = str | int | float | bool | None
Value = Scalar | bytes | list[Scalar] | list[dict[str, Scalar]]


@dataclass(frozen=True, slots=True)
class Row:
    """The wanted values of one row, and where it starts (``file.csv:17``, ``file.parquet row 5``)."""

    values: tuple[Value, ...]
    where: str
    group: str = ""
    """Rows of one group stay on one side when rows are held out; empty where nobody asks."""


class Carried(str):
    """The name of a column that is only carried along: a row may lack it, and it may hold anything."""


class Group(str):
    """The name of the column that tells which rows stay together."""


class Added(str):
    """The name of a column that something adds to rows: ``by`` is what to do where it is not there."""

    def __new__(cls, name: str, by: str) -> Added:
        """A name, and what adds the column."""
        made = super().__new__(cls, name)
        made.by = by
        return made

    by: str


class JsonText(str):
    """What a column that is only carried along holds, if it is no plain value: as JSON."""


class Listed(str):
    """The name of a column whose cells may be lists: words, labels, or spans.

    A cell is then a plain value, a list of plain values that are there, or a list of mappings to plain values.
    """


class Binary(str):
    """The name of a column whose cells are images or sounds: the path of a file (beside the file that names it, if it is no absolute
    one), or what such a file holds."""


ALL = "\0"
"""No column has this name: asking for it raises :class:`MissingColumn`, which tells those that there are."""


class MissingColumn(UserError):
    """There is no such column; ``present`` are those that there are."""

    def __init__(self, message: str, present: Sequence[str]) -> None:
        super().__init__(message)
        self.present = tuple(present)


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
    if isinstance(name, Added):
        return MissingColumn(f"{where}: no column {str(name)!r}: {name.by}", present)
    # Unnamed columns (pandas writes one for its index) cannot be chosen.
    named = [column if len(column) < 50 else f"{column[:40]}..." for column in present if column]
    hint = nearest(name, named)
    if hint.startswith("did you mean"):
        hint += f" (columns: {listed(named)})"
    keys = "data.split_group" if isinstance(name, Group) else "data.text / data.label"
    return MissingColumn(f"{where}: no column {name!r}: {hint}; set {keys} to one of these", present)


MOST_BLANK = 1000
"""Blank lines at the end of a file; after so many, no end is waited for."""


def iter_jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a file with one JSON object per line."""
    blank = 0
    with closing(read_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                blank = blank or number
                if number - blank > MOST_BLANK:
                    refuse_blank(path, blank)
                continue
            refuse_blank(path, blank)
            where = f"{path}:{number}"
            yield record_row(json_object(line, where), columns, where)


def record_row(record: Mapping[str, object], columns: tuple[str, ...], where: str) -> Row:
    """The row of a JSON object.

    Raises:
      UserError: it lacks a column, or holds there what no column can.
    """
    for name in columns:
        if name not in record and not isinstance(name, Carried):
            raise missing_column(name, list(record), where)
    return Row(tuple(json_value(record.get(name), name, where) for name in columns), where)


def iter_txt(path: Path | None, columns: tuple[str, ...]) -> Iterator[Row]:
    """One text per line, blank lines included; None reads standard input.

    Raises:
      UserError: more than one column is wanted.
    """
    where = "stdin" if path is None else str(path)
    named = [name for name in columns if name != ALL]
    if len(named) != 1:
        wanted = ", ".join(map(repr, named))
        raise UserError(f"{where}: plain lines hold one text each, but columns {wanted} are wanted; use .csv or .jsonl")
    return _iter_lines(read_lines(path, table=False) if path else decoded(sys.stdin.buffer, where), where)


def _iter_lines(lines: Lines, where: str) -> Iterator[Row]:
    with closing(lines):
        for number, line in enumerate(lines, start=1):
            yield Row((_without_newline(line),), f"{where}:{number}")


def refuse_blank(path: Path, number: int) -> None:
    """Raises UserError if a blank line (its number; 0: none) came before a row."""
    if number:
        raise UserError(f"{path}:{number}: a blank line before the end of the file; remove it or fill in the row")


def _without_newline(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def json_object(line: str, where: str) -> dict[str, object]:
    """The object that a line of JSON Lines holds.

    Raises:
      UserError: it holds none; begins with ``where``.
    """
    try:
        record = json.loads(line, parse_constant=refuse_constant)
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from error
    except ValueError as error:  # also a number of more than 4300 digits
        problem, column = getattr(error, "msg", str(error)), getattr(error, "colno", 1)
        raise UserError(f"{where}:{column}: not valid JSON: {problem}; each line must hold one whole object") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected a JSON object such as {{"text": ...}}, found a {type(record).__name__}')
    return record


def refuse_constant(name: str) -> NoReturn:
    """Raises ValueError for NaN and infinities, which JSON does not have."""
    raise ValueError(f"{name} is not a JSON value")


def json_value(value: object, name: str, where: str) -> Value:
    """:func:`plain_value` of what JSON held.

    Raises:
      UserError: as there, or a text is none.
    """
    found = plain_value(value, name, where)
    for text in _texts(found):
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                # JSON can spell what no Unicode text can hold; tokenizers refuse it much later and less clearly.
                raise UserError(
                    f"{where}: column {name!r} holds half of a \\u surrogate pair; correct the text"
                ) from error
    return found


def _texts(value: object) -> Iterator[str]:
    """The strings in a value of a column."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(list(item.values()) if isinstance(item, dict) else item)


def list_in_cell(cell: str, name: str, where: str) -> Value:
    """A cell of a table whose column may hold lists: one that begins with ``[`` is read as JSON, any other is a text.

    Raises:
      UserError: it is not valid JSON, or not such a list.
    """
    if not cell.startswith("["):
        return cell
    try:
        value = json.loads(cell, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        problem = getattr(error, "msg", str(error))
        raise UserError(
            f"{where}: column {name!r}: a cell that begins with [ must be a JSON list such as "
            f'["EU", "rejects"] ({problem}); texts that begin so can be given as .jsonl'
        ) from error
    return json_value(value, name, where)


def plain_value(value: object, name: str, where: str) -> Value:
    """``value`` if it is a string, number, boolean or None, or a list of these where the column may hold lists; UTF-8 bytes become
    a string.

    Raises:
      UserError: anything else.
    """
    if isinstance(name, Binary):
        return media_value(value, name, where)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: column {name!r} is not valid UTF-8: {error.reason}") from error
    if isinstance(value, int | float) and _is_beyond(value):
        raise UserError(f"{where}: column {name!r} holds a number beyond all that can be computed with; correct it")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(name, Listed):
        return _list_value(value, name, where)
    if isinstance(name, Carried):
        return JsonText(json.dumps(value, default=_shown, ensure_ascii=False))
    raise UserError(f"{where}: column {name!r} holds a {type(value).__name__}; expected a string, number or boolean")


def _is_beyond(value: float) -> bool:
    """Whether a number is infinite as a float: 1e400 in JSON, or a whole one of hundreds of digits. NaN is none, and is missing."""
    return value.bit_length() > 1023 if isinstance(value, int) else math.isinf(value)


def _shown(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


_SPAN = '{"start": 0, "end": 5, "label": "NAME"}'


def _list_value(value: object, name: str, where: str) -> Value:
    """A list of plain values or of mappings; a mapping to lists of one length (``datasets`` gives these) becomes the latter."""
    items = value
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {key: len(column) for key, column in value.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise UserError(f"{where}: column {name!r} holds lists of different lengths ({shown})")
        items = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(items, list):
        kind = "mapping" if isinstance(items, Mapping) else type(items).__name__
        raise UserError(
            f"{where}: column {name!r} holds a {kind}; expected a text, or a list of values or of spans {_SPAN}"
        )
    if any(isinstance(item, Mapping | list) for item in items):
        return [_span(item, i, name, where) for i, item in enumerate(items)]
    return [_item(item, f"{where}: item {i} of column {name!r}") for i, item in enumerate(items)]


def _item(value: object, what: str) -> Scalar:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{what} is not valid UTF-8: {error.reason}") from error
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(
            f"{what} is {'null' if value is None else value}, or a hidden label; fill it in, or leave out the row"
        )
    if isinstance(value, str | int | float | bool):
        return value
    raise UserError(f"{what} is a {type(value).__name__}; expected a string, number or boolean")


def _span(value: object, place: int, name: str, where: str) -> dict[str, Scalar]:
    """A mapping to plain values; ``[start, end, label]`` becomes one. What else a mapping holds (lists, nulls) is left out."""
    what = f"{where}: item {place} of column {name!r}"
    if isinstance(value, list) and len(value) == 3 and not any(isinstance(part, list | Mapping) for part in value):
        value = dict(zip(("start", "end", "label"), value, strict=True))
    if not isinstance(value, Mapping):
        raise UserError(f"{what} is {value!r:.60}; expected a span {_SPAN}, as other items are")
    kept = {key: part for key, part in value.items() if not isinstance(part, list | Mapping | None)}
    return {str(key): _item(part, f"{what}: {key!r}") for key, part in kept.items()}
