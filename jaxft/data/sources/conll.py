"""Rows of CoNLL files: a word per line with its label, a blank line after each sentence.

Columns are separated by tabs where the first word's line has one, else by blanks. The first holds the words, the last their labels. In
CoNLL-U (ten columns, words are numbered) the second holds the words, and which of the others are labels is to be said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from jaxft.data.sources.lines import read_lines
from jaxft.data.sources.rows import Row, missing_column, plain_value
from jaxft.errors import UserError

SUFFIXES = (".conll", ".conllu", ".bio", ".iob", ".iob2")

_BLANKS = " \t\r\n"  # other spaces are words, or parts of them
_DOCUMENT = "-DOCSTART-"
_MOST_COLUMNS = 1000
"""The columns of a line; CoNLL-U has ten."""
_PARTS = re.compile(r"\d+[-.]\d+")
"""In the first column of CoNLL-U: several words written as one, or a word that is not written."""


@dataclass(frozen=True)
class _Layout:
    """What the line of a file's first word shows."""

    line: int
    cells: tuple[str, ...]
    tabs: bool

    @property
    def numbered(self) -> bool:
        """Whether it is CoNLL-U, where words have numbers."""
        return self.tabs and len(self.cells) == 10 and self.cells[0] in ("1", "1-2", "0.1")

    def names(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Names of all columns, in the way of somebody who asks for ``wanted``."""
        names = [str(place) for place in range(len(self.cells))]
        if "0" in wanted:
            return tuple(names)
        pair = ("text", "label") if "text" in wanted else ("words", "labels")
        known = {self.position(name): name for name in pair}
        return tuple(known.get(place, name) for place, name in enumerate(names))

    def position(self, name: str) -> int | None:
        """Where a column is, by its place or by what it holds."""
        width = len(self.cells)
        known = {str(place): place for place in range(width)}
        known |= dict.fromkeys(("text", "words"), 1 if self.numbered else 0)
        if width > 1 and not self.numbered:
            known |= dict.fromkeys(("label", "labels"), width - 1)
        return known.get(name)


def iter_conll(path: Path, columns: tuple[str, ...], note: Callable[[str], None]) -> Iterator[Row]:
    """A row per sentence; each column is a list with one string per word.

    Columns are ``words`` (or ``text``), ``labels`` (or ``label``), and ``0``, ``1``, ... by their places. Lines ``-DOCSTART-`` are left
    out, and so are comments before a sentence.

    Raises:
      UserError: a column that is not there or whose cell is empty, or a line with more or fewer columns than the first.
    """
    layout = _layout(path)
    if layout is None:
        return
    names = layout.names(columns)
    positions = []
    for name in columns:
        position = layout.position(name)
        if position is None:
            raise missing_column(name, names, f"{path}:{layout.line}")
        positions.append(position)
    if layout.tabs and any(" " in cell for cell in layout.cells):
        note(f"{path}: tabs separate its {len(names)} columns ({', '.join(names)}), blanks do not")
    for begin, lines in _sentences(path, layout):
        values = []
        for name, position in zip(columns, positions, strict=True):
            cells = [cells[position] for _, cells in lines]
            if "" in cells:
                raise UserError(f"{path}:{lines[cells.index('')][0]}: column {name!r} is empty")
            values.append(plain_value(cells, name, f"{path}:{begin}"))
        yield Row(tuple(values), f"{path}:{begin}")


_Lines = list[tuple[int, list[str]]]


def _sentences(path: Path, layout: _Layout) -> Iterator[tuple[int, _Lines]]:
    """For each sentence the line where it begins, and line numbers and cells of its words."""
    width, labels = len(layout.cells), set[str]()
    sentence: _Lines = []
    with closing(read_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            cells = _cells(line, layout.tabs)
            if not line.strip(_BLANKS) or line.startswith(_DOCUMENT):
                if sentence:
                    yield sentence[0][0], sentence
                sentence = []
                continue
            if not sentence and line.startswith("#"):  # a comment, or a word such as those of tweets
                if len(cells) != width:
                    continue
                if width > 1 and not layout.tabs:
                    labels = labels or _last_cells(path, layout)
                    if cells[-1] not in labels:
                        continue
            if len(cells) != width:
                tabs = "tabs" if layout.tabs else "blanks"
                raise UserError(
                    f"{path}:{number}: expected {width} columns separated by {tabs}, as in line {layout.line}, found {len(cells)}; "
                    "each line holds one word, and a blank line ends a sentence"
                )
            if layout.numbered and _PARTS.fullmatch(cells[0]):
                continue
            sentence.append((number, cells))
    if sentence:
        yield sentence[0][0], sentence


def _cells(line: str, tabs: bool) -> list[str]:
    return line.rstrip("\r\n").split("\t") if tabs else re.split("[ \t]+", line.strip(_BLANKS))


def _layout(path: Path) -> _Layout | None:
    """The first word's line; of comments alone, there is none."""
    with closing(read_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip(_BLANKS) and not line.startswith(("#", _DOCUMENT)):
                tabs = "\t" in line.rstrip(_BLANKS)
                if (width := len(_cells(line, tabs))) > _MOST_COLUMNS:
                    raise UserError(f"{path}:{number}: has {width:,} columns; each line holds one word and its labels")
                return _Layout(number, tuple(_cells(line, tabs)), tabs)
    return None


def _last_cells(path: Path, layout: _Layout) -> set[str]:
    """What the last column holds in lines that are no comments: in other lines, that tells words from comments of as many blanks."""
    with closing(read_lines(path)) as lines:
        rows = (_cells(line, layout.tabs) for line in lines if not line.startswith("#"))
        return {cells[-1] for cells in rows if len(cells) == len(layout.cells)}
