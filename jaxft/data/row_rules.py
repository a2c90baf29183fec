"""What becomes of rows before they are encoded: texts and labels that are missing, labels that are renamed, rows that are left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxft.config import DataConfig
from jaxft.data.labels import MOST_LABEL, label_text
from jaxft.data.processors.image import decoded
from jaxft.data.processors.sound import read_sound
from jaxft.data.sources.media import BrokenFile, file_of
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError, listed

if TYPE_CHECKING:
    from jaxft.data.encode import Column


class RowRules:
    """The rules of ``data.missing_text``, ``missing_label`` and ``label_map``, for the rows of one source; counts what they did."""

    def __init__(self, config: DataConfig, columns: Sequence[Column], shown: str) -> None:
        self._config, self._shown = config, shown
        self._texts = tuple(column for column in columns if column.is_text)
        read = (
            "text",
            "words",
            "messages",
            "texts",
            "image",
            "sound",
        )  # what the model reads; the task itself looks at further texts
        self._labels = [(i, column.name, column.kind) for i, column in enumerate(columns) if column.kind not in read]
        # A task whose rows have several labels renames them itself.
        self._map = label_map(config.label_map) if any(kind == "label" for _, _, kind in self._labels) else {}
        self._mapped = dict.fromkeys(self._map, 0)
        self._media = [(i, column.kind) for i, column in enumerate(columns) if column.kind in ("image", "sound")]
        self._rows = self._kept = self._without_text = self._without_label = self._broken = 0
        self._any_text = False

    def kept(self, row: Row) -> Row | None:
        """The row with its labels renamed; None if it is left out.

        Raises:
          UserError: a text that is not text, or a missing one, or a missing label, that no rule leaves out.
        """
        self._rows += 1
        texts = row.values[: len(self._texts)]
        if self._config.missing_text == "skip" and not all(map(_holds_text, texts)):
            self._without_text += 1
            return None
        check_texts(row, self._texts, cure="remove the row, or leave such rows out with data.missing_text=skip")
        if self._config.broken_files == "skip" and any(
            is_broken(row.values[i], kind, row.where) for i, kind in self._media
        ):
            self._broken += 1
            return None
        for i, name, kind in self._labels:
            value = row.values[i]
            if value is None or (not isinstance(value, list) and label_text(value) == ""):
                if self._config.missing_label == "skip":
                    self._without_label += 1
                    return None
                what = {"number": "a number", "numbers": "a list of numbers"}.get(kind, "a label")
                raise UserError(
                    f"{row.where}: column {name!r} is empty; every row needs {what} (data.missing_label=skip leaves such rows out)"
                )
            if isinstance(value, str) and len(value) > MOST_LABEL:
                raise UserError(
                    f"{row.where}: column {name!r} holds a label of {len(value):,} characters, at most {MOST_LABEL:,} are possible; "
                    "is data.label the column of the texts?"
                )
            if self._map and kind == "label" and (label := label_text(value)) in self._map:
                self._mapped[label] += 1
                if (renamed := self._map[label]) is None:
                    return None
                row = dataclasses.replace(row, values=(*row.values[:i], renamed, *row.values[i + 1 :]))
        self._kept += 1
        self._any_text = self._any_text or any(map(_holds_text, texts))
        return row

    def refuse_nothing(self) -> None:
        """Raises UserError, after the last row, if no row is left, or none with a text that is not empty."""
        if not self._rows:
            raise UserError(f"{self._shown}: the data set is empty")
        if self._without_text == self._rows:
            raise UserError(f"{self._shown}: no row has a text (data.missing_text=skip leaves out all {self._rows})")
        if not self._kept:
            raise UserError(f"{self._shown}: no row is left: {'; '.join(self._left_out())}")
        if not self._any_text:
            column = f"(column {self._config.text!r}, data.text)"
            raise UserError(f"{self._shown}: all of its {self._kept} texts are empty {column}")

    def lines(self) -> Iterator[str]:
        """What was done, a line for each rule that did anything."""
        for line in self._left_out():
            yield f"{self._shown}: {line}"
        renamed = {label: to for label, to in self._map.items() if to is not None and self._mapped[label]}
        if renamed:
            said = (f"{label!r} is {to!r} ({self._mapped[label]} rows)" for label, to in renamed.items())
            yield f"{self._shown}: data.label_map: {listed(said)}"
        if unseen := [repr(label) for label, count in self._mapped.items() if not count]:
            yield f"{self._shown}: data.label_map: no row has label {listed(unseen)}"

    def _left_out(self) -> Iterator[str]:
        for count, what in ((self._without_text, "text"), (self._without_label, "label")):
            if count:
                yield f"{count} of {self._rows} rows have no {what} and are left out"
        if self._broken:
            yield f"{self._broken} of {self._rows} rows have a file that cannot be read and are left out"
        dropped = {label: self._mapped[label] for label, to in self._map.items() if to is None and self._mapped[label]}
        if dropped:
            said = listed(f"{label!r} ({count})" for label, count in dropped.items())
            yield f"{sum(dropped.values())} of {self._rows} rows are left out by data.label_map: {said}"


def is_broken(value: object, kind: str, where: str) -> bool:
    """Whether a cell holds no image or sound that can be decoded, nor the path of one."""
    assert isinstance(value, bytes | str)
    try:
        if kind == "image":
            decoded(value, "L", where)
        else:
            read_sound(file_of(value, where), where)
    except BrokenFile:  # not what is missing on this machine
        return True
    return False


def label_map(declared: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """By label of the data, the name that ``data.label_map`` gives it; None: its rows are left out.

    Raises:
      UserError: a label is there twice (``1`` and ``1.0``) or empty, or a name is empty.
    """
    found: dict[str, str | None] = {}
    for label, to in (declared or {}).items():
        name, renamed = label_text(label), None if to is None else label_text(to)
        if not name or renamed == "":
            raise UserError(f"data.label_map: {'a label' if not name else f'the name of {name!r}'} is empty")
        if name in found:
            raise UserError(f"data.label_map: label {name!r} is there twice")
        found[name] = renamed
    return found


def _holds_text(value: object) -> bool:
    """Whether a cell has something to read: a text that is not blank, or words."""
    return bool(value) if isinstance(value, list | bytes) else not _is_missing(value) and bool(str(value).strip())


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_texts(row: Row, columns: Sequence[Column], cure: str = "every row needs one here") -> None:
    """Raises UserError if a column of texts holds anything but text, or words; ``cure``: what to do where there is none."""
    for value, column in zip(row.values, columns, strict=False):
        if _is_missing(value):
            raise UserError(
                f"{row.where}: column {column.name!r} holds no text ({'null' if value is None else value}); {cure}"
            )
        if column.kind == "messages":
            continue
        if column.kind in ("image", "sound"):
            if not value or not isinstance(value, str | bytes):
                raise UserError(f"{row.where}: column {column.name!r} holds no {column.kind}; {cure}")
            continue
        words = column.kind == "words" and isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not isinstance(value, str) and not words:
            raise UserError(
                f"{row.where}: column {column.name!r} holds {value!r:.80}, which is not text; set data.text"
            )
