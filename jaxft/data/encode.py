"""Rows of a source, checked; their texts tokenised; rows held out."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.examples import Encoded, stable_order
from jaxft.data.labels import label_text
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.read import Reference, Row, form_of, iter_rows, shown
from jaxft.data.sources.rows import Listed
from jaxft.errors import UserError

_CHUNK = 1024  # rows tokenised at a time: enough to keep the tokenizer's threads busy


class Column(NamedTuple):
    """A column of the data that a task reads."""

    name: str
    kind: Literal["text", "words", "texts", "label", "labels", "number"]
    """``text``: a text. ``words``: a text, or a list of words. ``texts``: more texts, one or a list, that the task checks itself.
    ``label``: one value, of few that there are. ``labels``: a list of values, or of stretches of characters with a label each.
    ``number``: one number."""

    @property
    def wanted(self) -> str:
        """How a source is asked for it."""
        return Listed(self.name) if self.kind in ("words", "texts", "labels") else self.name

    @property
    def is_text(self) -> bool:
        """Whether it is what the model reads."""
        return self.kind in ("text", "words")


def text_columns(config: DataConfig) -> tuple[Column, ...]:
    """The columns of a text, or of two."""
    names = (config.text, *((config.text_pair,) if config.text_pair else ()))
    return tuple(Column(name, "text") for name in names)


def label_column(config: DataConfig) -> Column:
    """The column of a label."""
    return Column(config.label, "label")


def read_rows(
    reference: Reference,
    config: DataConfig,
    columns: Sequence[Column] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Row]:
    """Reads every row of a source, as :func:`checked_rows` gives them."""
    return list(checked_rows(reference, config, columns, note))


def checked_rows(
    reference: Reference,
    config: DataConfig,
    columns: Sequence[Column] | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """The rows of a source, one at a time.

    Args:
      columns: which ones, in the order that their values are wanted in, texts first; None: text, pair if there is one, and label.
      note: told what was found out about files, and how many rows were left out.

    Raises:
      UserError: when the row that shows it is reached: no rows, a text that is not text, no text that is not empty, or a missing
        label.
    """
    columns = (*text_columns(config), label_column(config)) if columns is None else columns
    texts = tuple(column for column in columns if column.is_text)
    labels = [
        (i, column.name, column.kind)
        for i, column in enumerate(columns)
        if column.kind not in ("text", "words", "texts")
    ]
    rows = left_out = 0
    any_text = False
    for row in iter_rows(reference, tuple(column.wanted for column in columns), form_of(config, note)):
        rows += 1
        if config.missing_text == "skip" and not all(_holds_text(value) for value in row.values[: len(texts)]):
            left_out += 1
            continue
        check_texts(row, texts, cure="remove the row, or leave such rows out with data.missing_text=skip")
        for i, name, kind in labels:
            value = row.values[i]
            if value is None or (not isinstance(value, list) and label_text(value) == ""):
                raise UserError(
                    f"{row.where}: column {name!r} is empty; every row needs {'a number' if kind == 'number' else 'a label'}"
                )
        any_text = any_text or any(_holds_text(text) for text in row.values[: len(texts)])
        yield row
    if not rows:
        raise UserError(f"{shown(reference)}: the data set is empty")
    if left_out == rows:
        raise UserError(f"{shown(reference)}: no row has a text (data.missing_text=skip leaves out all {rows})")
    if not any_text:
        raise UserError(f"{shown(reference)}: all of its {rows} texts are empty (column {config.text!r}, data.text)")
    if note and left_out:
        note(f"{shown(reference)}: {left_out} of {rows} rows have no text and are left out")


def _holds_text(value: object) -> bool:
    """Whether a cell has something to read: a text that is not blank, or words."""
    return bool(value) if isinstance(value, list) else not _is_missing(value) and bool(str(value).strip())


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_texts(row: Row, columns: Sequence[Column], cure: str = "every row needs one here") -> None:
    """Raises UserError if a column of texts holds anything but text, or words; ``cure``: what to do where there is none."""
    for value, column in zip(row.values, columns, strict=False):
        if _is_missing(value):
            raise UserError(
                f"{row.where}: column {column.name!r} holds no text ({'null' if value is None else value}); {cure}"
            )
        words = column.kind == "words" and isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not isinstance(value, str) and not words:
            raise UserError(
                f"{row.where}: column {column.name!r} holds {value!r:.80}, which is not text; set data.text"
            )


def encode_texts(
    rows: Iterable[Row], tokenizer: TextProcessor, *, paired: bool, split: bool = False, end_id: int | None = None
) -> Iterator[Encoded]:
    """The tokens and token types of rows whose first value is a text, the second its pair if there is one.

    Args:
      split: texts that are too long become several examples (see :meth:`TextProcessor.encode`).
      end_id: appended to each text that does not end with it and has room.
    """
    for first, chunk in chunks_of(rows):
        texts = [str(row.values[0]) for row in chunk]
        pairs = [str(row.values[1]) for row in chunk] if paired else None
        for i, (ids, types, dropped) in enumerate(tokenizer.encode(texts, pairs, split=split)):
            if end_id is not None and ids[-1:] != [end_id] and len(ids) != tokenizer.max_length:
                ids, types = [*ids, end_id], [*types, types[-1] if types else 0]
            example = {"tokens": np.asarray(ids, np.int32), "types": np.asarray(types, np.int32)}
            yield Encoded(example, first + i, dropped)


def chunks_of(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Rows, many at a time, with the number of the first of each."""
    remaining, first = iter(rows), 0
    while chunk := list(islice(remaining, _CHUNK)):
        yield first, chunk
        first += len(chunk)


def hold_out(rows: list[Row], fraction: float, seed: int, label: int | None = -1) -> tuple[list[Row], list[Row]]:
    """Rows split into (kept, held out), with the share of each label kept (stratified); each label keeps one row at least.

    Args:
      label: index of the label among a row's values; None: rows have none.

    Raises:
      UserError: nothing would be held out.
    """
    labels = LabelCounts(label)
    for row in rows:
        labels.add(row)
    held = labels.held_out(fraction, seed)
    return [row for row, out in zip(rows, held, strict=True) if not out], [rows[i] for i in np.flatnonzero(held)]


class LabelCounts:
    """Which label each row has, as a number, for rows that need not stay in memory."""

    def __init__(self, label: int | None) -> None:
        self._label = label
        self._numbers: dict[str, int] = {}
        self._rows = array("i")

    def add(self, row: Row) -> None:
        """The next row."""
        name = "" if self._label is None else label_text(row.values[self._label])
        self._rows.append(self._numbers.setdefault(name, len(self._numbers)))

    def __len__(self) -> int:
        return len(self._rows)

    def held_out(self, fraction: float, seed: int) -> np.ndarray:
        """[rows] bool: which ones are held out; see :func:`hold_out`."""
        numbers = np.array(self._rows, np.int32)
        order = stable_order(numbers)
        groups = np.split(order, np.cumsum(np.bincount(numbers, minlength=len(self._numbers)))[:-1])
        rng = np.random.default_rng([seed, 0x5EED])
        held = np.zeros(len(numbers), bool)
        for name in sorted(self._numbers):
            members = groups[self._numbers[name]]
            count = min(round(fraction * len(members)), len(members) - 1)
            held[rng.permutation(members)[:count]] = True
        if not held.any():
            raise UserError(f"data.eval_fraction={fraction} holds out no row of {len(numbers)}; set data.eval")
        return held
