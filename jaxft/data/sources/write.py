"""Rows written as CSV, TSV or JSON Lines, as the name of the file says."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from jaxft.errors import UserError

_TABLES = {".csv": ",", ".tsv": "\t"}
_CONTROLS = re.compile("[\x7f-\x9f]")  # JSON may leave them as they are, and terminals obey them


def is_table(path: str | None) -> bool:
    """Whether a file's name asks for rows of cells; JSON Lines otherwise."""
    return path is not None and Path(path).suffix.lower() in _TABLES


def row_writer(path: str | None, file: IO[str], *, ascii_only: bool = False) -> Callable[[Mapping[str, object]], None]:
    """A function that writes one row; all rows have the keys of the first, which become the header of a table.

    Args:
      path: its suffix tells the format; None: JSON Lines.
      ascii_only: JSON escapes all other letters.
    """
    if not is_table(path):
        return lambda row: _write_json(row, file, ascii_only)
    assert path is not None
    separator = _TABLES[Path(path).suffix.lower()]
    write = csv.writer(file, lineterminator="\n").writerow if separator == "," else _tsv_writer(path, file)
    count = 0

    def write_row(row: Mapping[str, object]) -> None:
        nonlocal count
        if not count:
            write(list(row))
        count += 1
        write([_cell(value) for value in row.values()])

    return write_row


def _write_json(row: Mapping[str, object], file: IO[str], ascii_only: bool) -> None:
    line = json.dumps(row, ensure_ascii=ascii_only, allow_nan=False)
    file.write(_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _tsv_writer(path: str, file: IO[str]) -> Callable[[list[str]], None]:
    def write(cells: list[str]) -> None:
        for cell in cells:
            if any(mark in cell for mark in "\t\n\r"):
                raise UserError(
                    f"{path}: a cell has a tab or a line break, which TSV cannot hold; write .csv or .jsonl: {cell!r:.60}"
                )
        file.write("\t".join(cells) + "\n")

    return write
