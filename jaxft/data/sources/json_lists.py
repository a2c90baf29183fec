"""Rows of JSON files: a list of objects, or an object one of whose keys holds that list; one object in memory at a time.

SQuAD's own form, whose list is of articles, gives a row per question. Files of JSON Lines are often called .json too, and are read as what
they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

from jaxft.data.sources.lines import MOST_RECORD, Lines, read_pieces, too_long
from jaxft.data.sources.rows import Row, iter_jsonl, record_row, refuse_constant
from jaxft.data.sources.squad import iter_squad
from jaxft.errors import UserError, listed
from jaxft.files import MOST_DEPTH

_WANTED = 'a .json file must be a list of objects, [{"text": ...}, ...], or an object that has one, {"data": [{...}]}'
_SEEN = re.compile(r"[^ \t\r\n]")
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)
"""A whole string, or a bracket; a quote alone begins a string whose end is not there yet."""
_SCALAR_END = re.compile(r"[,\]}\s]")


def iter_json(path: Path, columns: tuple[str, ...], note: Callable[[str], None]) -> Iterator[Row]:
    """A row per object of the file's list, or per question where it is of SQuAD's form.

    Raises:
      UserError: not valid JSON, cut off, no list of objects or several, or a row without one of the columns.
    """
    with closing(read_pieces(path)) as pieces:
        text = _Text(pieces, str(path))
        if _is_lines(text):
            note(f"{path}: is read as JSON Lines: each line is an object")
            yield from iter_jsonl(path, columns)
            return
        if text.peek() == "[":
            yield from _rows(text, columns, path)
        elif text.peek() == "{":
            yield from _rows_of_key(text, columns, path)
        else:
            raise UserError(f"{path}:{text.line}: is no JSON list or object; {_WANTED}")
        if text.peek():
            raise UserError(f"{path}:{text.line}: not valid JSON: more follows after its end; {_WANTED}")


def _is_lines(text: _Text) -> bool:
    """Whether the first line is an object by itself, and another one follows."""
    text.peek()
    first, ended, rest = text.rest().partition("\n")
    if not ended or not rest.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _rows_of_key(text: _Text, columns: tuple[str, ...], path: Path) -> Iterator[Row]:
    """The rows of the only key that holds a list of objects."""
    keys, found, empty = list[str](), "", False
    for key in _keys(text):
        keys.append(key)
        if text.peek() != "[" or not text.begins_objects():
            empty = text.value() == [] or empty
            continue
        if found:
            raise UserError(
                f"{path}: keys {found!r} and {key!r} both hold lists of objects; keep the one that has the rows"
            )
        found = key
        yield from _rows(text, columns, path, squad=key == "data")
    if not found and not empty:
        shown = f" (keys: {listed(keys[:6])})" if keys else ""
        raise UserError(f"{path}: is an object without a list of objects{shown}; {_WANTED} (pandas: orient='records')")


def _rows(text: _Text, columns: tuple[str, ...], path: Path, *, squad: bool = False) -> Iterator[Row]:
    items = _items(text)
    first = list(islice(items, 1))
    if squad and first and isinstance(first[0], dict) and isinstance(first[0].get("paragraphs"), list):
        yield from iter_squad(chain(first, items), columns, path)
        return
    for number, item in enumerate(chain(first, items)):
        where = f"{path} row {number}"
        if not isinstance(item, dict):
            raise UserError(f'{where}: expected a JSON object such as {{"text": ...}}, found a {type(item).__name__}')
        yield record_row(item, columns, where)


def _items(text: _Text) -> Iterator[Any]:
    """The values of the list that begins here."""
    text.take("[")
    if text.peek() != "]":
        yield text.value()
        while text.peek() == ",":
            text.take(",")
            yield text.value()
    text.take("]", "',' or ']'")


def _keys(text: _Text) -> Iterator[str]:
    """The keys of the object that begins here; whoever is given one takes its value."""
    text.take("{")
    while text.peek() != "}":
        if text.peek() != '"':
            raise text.error("expected a key in double quotes")
        key = text.value()
        text.take(":")
        yield key
        if text.peek() != ",":
            break
        text.take(",")
    text.take("}", "',' or '}'")


class _Text:
    """A file's text from a place on, of which no more is held than has been asked for."""

    def __init__(self, pieces: Lines, where: str) -> None:
        self._pieces, self._where = pieces, where
        self._held, self._at = "", 0
        self.line = 1

    def rest(self) -> str:
        """What is held of the text from here on."""
        return self._held[self._at :]

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            if seen := _SEEN.search(self._held, self._at):
                self._pass(seen.start())
                return seen[0]
            self._pass(len(self._held))
            if not self._more():
                return ""

    def take(self, mark: str, expected: str = "") -> None:
        """Goes on behind a character, which must come next."""
        if self.peek() != mark:
            raise self.error(f"expected {expected or repr(mark)}")
        self._pass(self._at + 1)

    def begins_objects(self) -> bool:
        """Whether the list that begins here has an object for its first item."""
        while (seen := _SEEN.search(self._held, self._at + 1)) is None:
            if not self._more():
                return False
        return seen[0] == "{"

    def value(self) -> Any:
        """The value that begins here; goes on behind it."""
        begin = self.peek()
        if not begin:
            raise self.error("expected a value")
        line, end = self.line, self._end(begin)
        written = self._held[self._at : end]
        self._pass(end)
        try:
            return json.loads(written, parse_constant=refuse_constant)
        except RecursionError as error:
            raise UserError(f"{self._where}:{line}: not valid JSON: nested too deeply") from error
        except ValueError as error:  # also a number of more than 4300 digits
            problem, below = getattr(error, "msg", str(error)), getattr(error, "lineno", 1) - 1
            raise UserError(f"{self._where}:{line + below}: not valid JSON: {problem}") from error

    def error(self, problem: str) -> UserError:
        """That something else stands here, or that the file ends."""
        found = self.peek()
        said = f"{problem}, found {found!r}" if found else f"the file ends here ({problem}): it was cut off"
        return UserError(f"{self._where}:{self.line}: not valid JSON: {said}")

    def _end(self, begin: str) -> int:
        """Where the value that begins here ends."""
        if begin not in ("{", "[", '"'):
            return self._scalar_end()
        depth, behind = 0, 0  # characters of it that have been looked at
        while True:
            for mark in _MARKS.finditer(self._held, self._at + behind):
                if mark[0] == '"':
                    behind = mark.start() - self._at
                    break
                behind = mark.end() - self._at
                depth += (mark[0] in "{[") - (mark[0] in "}]")
                if depth == 0:
                    return mark.end()
                if depth > MOST_DEPTH:
                    raise UserError(f"{self._where}:{self.line}: not valid JSON: nested too deeply")
            else:
                behind = len(self._held) - self._at
            if behind > MOST_RECORD:
                raise too_long(f"{self._where}:{self.line}: the value that begins here")
            if not self._more():
                raise UserError(
                    f"{self._where}:{self.line}: not valid JSON: the file ends inside of what begins here: it was cut off, or a "
                    "quote or bracket is missing"
                )

    def _scalar_end(self) -> int:
        while True:
            if mark := _SCALAR_END.search(self._held, self._at):
                return mark.start()
            if not self._more():
                return len(self._held)

    def _pass(self, place: int) -> None:
        self.line += self._held.count("\n", self._at, place)
        self._at = place

    def _more(self) -> bool:
        """Reads on; twice as much as is held, so that a long value is not copied for each piece."""
        kept = self._held[self._at :]
        parts, size = [kept], 0
        for piece in self._pieces:
            parts.append(piece)
            size += len(piece)
            if size >= len(kept):
                break
        self._held, self._at = "".join(parts), 0
        return size > 0
