"""Rows of separated values, CSV and TSV: where the header is, what separates cells, whether quotes are quotes.

A file is read as its suffix says if the wanted columns are found so. Otherwise the other usual separators are tried, and what
programs put before a header (``sep=;``, lines that begin with ``#``) is left out; each is said. docs/data.md has the rules.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Literal

from jaxft.data.sources.lines import MOST_RECORD, read_lines
from jaxft.data.sources.rows import (
    ALL,
    MOST_BLANK,
    Listed,
    MissingColumn,
    Row,
    Value,
    column_positions,
    list_in_cell,
    missing_column,
    refuse_blank,
)
from jaxft.errors import UserError

_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_EXCEL = re.compile(r"\"?sep=(.)\"?\r?\n?", re.IGNORECASE)
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def _ignore(text: str) -> None:
    """Takes a note that nobody wants."""


@dataclass(frozen=True)
class Form:
    """What a user may say of a table, and who hears what was found out."""

    header: bool = True
    """The first line names the columns; else they are named 0, 1, 2, ..."""
    quotes: Literal["auto", "double", "none"] = "auto"
    """Whether cells may stand in double quotes (RFC 4180). ``auto``: yes, but between tabs only if the whole file shows it."""
    note: Callable[[str], None] = _ignore


@dataclass(frozen=True)
class _Layout:
    separator: str
    quoted: bool
    skip: int
    """Lines before the header, or before the first row without one."""
    names: list[str]
    problem: UserError | None = None
    """Why the first row cannot be read so."""


def iter_table(path: Path, columns: tuple[str, ...], form: Form, separator: str) -> Iterator[Row]:
    """Rows of a file whose suffix stands for ``separator``.

    Raises:
      UserError: a column that is not there, cells that do not fit the header, quotes that do not match.
    """
    # The standard limit (131,072) refuses long documents; no limit at all would let one forgotten quote pull the whole rest of a
    # file into memory.
    csv.field_size_limit(max(csv.field_size_limit(), MOST_RECORD))
    layout = _layout(path, columns, form, separator)
    with closing(_cells(path, layout.separator, layout.quoted, layout.skip)) as rows:
        yield from _rows(path, columns, form, layout, rows)


# Pairs of the line where a row starts and its cells; a blank line has none.
_Cells = Generator[tuple[int, list[str]], None, None]


def _rows(path: Path, columns: tuple[str, ...], form: Form, layout: _Layout, rows: _Cells) -> Iterator[Row]:
    names, where = layout.names, f"{path}:{layout.skip + 1}"
    if form.header:
        next(rows, None)
        _check_header(names, where)
    if names or form.header:  # a file without a line has no rows, and no columns
        _refuse_missing(names, columns, where, form)
    positions = column_positions(names, columns, where) if names else []
    lists = any(isinstance(name, Listed) for name in columns)
    blank = 0
    for number, cells in rows:
        if not cells:
            blank = blank or number
            if number - blank > MOST_BLANK:
                refuse_blank(path, blank)
            continue
        refuse_blank(path, blank)
        if len(cells) != len(names):
            as_in = "the header" if form.header else "the first row"
            raise UserError(
                f"{path}:{number}: expected {len(names)} cells as in {as_in}, found {len(cells)}; "
                f"correct the row (a separator or quote inside a text?){_more_of_quotes(layout, form)}"
            )
        values = tuple(cells[position] for position in positions)
        at = f"{path}:{number}"
        yield Row(tuple(map(_value, values, columns, repeat(at))) if lists else values, at)


def _value(cell: str, name: str, where: str) -> Value:
    return list_in_cell(cell, name, where) if isinstance(name, Listed) else cell


def _more_of_quotes(layout: _Layout, form: Form) -> str:
    return "" if layout.quoted or form.quotes == "none" else ", or set data.quotes=double if quotes enclose cells here"


def _check_header(names: list[str], where: str) -> None:
    if not any(name.strip() for name in names):
        raise UserError(f"{where}: there is no header; the first line must name the columns")
    for name, count in Counter(names).items():
        if name and count > 1:
            raise UserError(f"{where}: the header names column {name!r} {count} times; rename all but one")


def _refuse_missing(names: list[str], columns: tuple[str, ...], where: str, form: Form) -> None:
    missing = [name for name in columns if name not in names]
    if not missing:
        return
    error = str(missing_column(missing[0], names, where))
    if not form.header:
        error += " (data.header=false: columns have numbers for names)"
    elif "did you mean" not in error:
        error += "; if that line is a row, there is no header: data.header=false data.text=0 data.label=1, by position"
    raise MissingColumn(error, names)


def _layout(path: Path, columns: tuple[str, ...], form: Form, usual: str) -> _Layout:
    with closing(read_lines(path)) as lines:
        first = list(islice(lines, 100))
    excel = _EXCEL.fullmatch(first[0]) if first else None
    skip = 1 if excel else 0
    candidates = [excel[1]] if excel else [usual, *(other for other in _SEPARATORS if other != usual)]
    comments = next((i for i, line in enumerate(first[skip:]) if not line.startswith("#")), 0) if form.header else 0
    fit, layouts = None, []
    for lines_before in (skip, skip + comments) if comments else (skip,):
        for separator in candidates:
            if fit is None:
                layouts.append(_read_as(path, separator, form, lines_before))
                fit = layouts[-1] if set(columns) - {ALL} <= set(layouts[-1].names) else None
    if fit and fit.skip > skip:
        form.note(f"{path}: {comments} lines that begin with # before the header are left out")
    # Without a fit, the error shows the columns of the likeliest reading.
    if fit is None and layouts[0].problem:
        raise layouts[0].problem
    widest = max(layouts, key=lambda layout: len(layout.names))
    chosen = fit or (layouts[0] if len(layouts[0].names) > 1 else widest)
    if chosen.separator != usual and len(chosen.names) > 1:
        shown = _SEPARATORS.get(chosen.separator, repr(chosen.separator))
        form.note(f"{path}: cells are separated by {shown}")
    if chosen.quoted and chosen.separator == "\t" and form.quotes == "auto":
        form.note(f"{path}: cells in double quotes are read without them (data.quotes=none keeps them)")
    return chosen


def _read_as(path: Path, separator: str, form: Form, skip: int) -> _Layout:
    quoted = form.quotes == "double" or (form.quotes == "auto" and separator != "\t")
    if separator == "\t" and form.quotes == "auto":
        quoted = _has_quoted_cells(path, skip)
    cells, problem = [], None
    with closing(_cells(path, separator, quoted, skip)) as rows:
        try:
            cells = next(rows, (1, []))[1]
        except UserError as error:
            problem = error
    names = cells if form.header else [str(i) for i in range(len(cells))]
    return _Layout(separator, quoted, skip, names, problem)


def _has_quoted_cells(path: Path, skip: int) -> bool:
    """Whether a tab-separated file was written with quotes around cells (RFC 4180), rather than with quotes as ordinary characters.

    If each line has as many cells as the first, quotes are quotes where every cell that begins with one ends with one, no other
    cell has any, and all that are enclosed had to be (they hold a doubled quote) or the header's cells are enclosed too. If
    not, they are quotes where reading them so gives every row as many cells as the first.
    """
    width, even, seen, whole, needed, header = 0, True, False, True, True, False
    with closing(read_lines(path)) as lines:
        for line in islice(lines, skip, None):
            text = line.removesuffix("\n").removesuffix("\r")
            cells = text.split("\t")
            if not width and len(cells) == 1:
                return False  # no table of tabs, or of one column
            if not width:
                width, header = len(cells), all(_QUOTED.fullmatch(cell) for cell in cells)
            even = even and (len(cells) == width or not text)
            for cell in cells if '"' in text else ():
                enclosed = _QUOTED.fullmatch(cell) is not None
                seen = seen or cell.startswith('"')
                whole = whole and (enclosed or '"' not in cell)
                needed = needed and (not enclosed or '""' in cell[1:-1] or "\r" in cell)
    if even or not seen:
        return seen and whole and (needed or header)
    try:
        with closing(_cells(path, "\t", True, skip)) as rows:
            widths = {len(cells) for _, cells in rows if cells}
    except UserError:
        return False
    return len(widths) == 1


def _cells(path: Path, separator: str, quoted: bool, skip: int) -> _Cells:
    with closing(read_lines(path)) as lines:
        kept = islice(lines, skip, None)
        if not quoted:
            for number, line in enumerate(kept, start=skip + 1):
                text = line.removesuffix("\n").removesuffix("\r")
                yield number, text.split(separator) if text else []
            return
        reader = csv.reader(kept, delimiter=separator, strict=True)
        while True:
            start = skip + reader.line_num + 1
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
        return f"a quote opened in this row is never closed ({text}); data.quotes=none takes quotes for ordinary characters"
    if "new-line character" in text:
        return "a carriage return outside quotes; end lines with \\n or \\r\\n"
    return f"{text}; a quote inside a quoted text must be doubled, or set data.quotes=none"
