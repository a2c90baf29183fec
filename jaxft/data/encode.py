"""Rows of a source, checked; their texts tokenised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.examples import Encoded
from jaxft.data.labels import label_text
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.row_rules import RowRules
from jaxft.data.sources.read import Reference, Row, form_of, iter_rows, shown
from jaxft.data.sources.rows import Added, Binary, Group, Listed
from jaxft.errors import UserError

_CHUNK = 1024  # rows tokenised at a time: enough to keep the tokenizer's threads busy

_MOST_CHARACTERS = 1 << 23
"""Characters tokenised at a time, of long documents: the tokenizer needs a hundred bytes for each token."""


class Column(NamedTuple):
    """A column of the data that a task reads."""

    name: str
    kind: Literal["text", "words", "messages", "texts", "image", "sound", "label", "labels", "number", "numbers"]
    """``text``: a text. ``words``: a text, or a list of words. ``messages``: a list of mappings, which the task checks itself.
    ``texts``: more texts, one or a list, that the task checks itself. ``image``, ``sound``: a file, or the path of one.
    ``label``: one value, of few that there are. ``labels``: a list of values, or of stretches of characters with a label each.
    ``number``: one number. ``numbers``: a list of them."""
    added_by: str | None = None
    """What to do where rows do not have it, if it is a column that something adds to them."""

    @property
    def wanted(self) -> str:
        """How a source is asked for it."""
        if self.added_by is not None:
            return Added(self.name, self.added_by)
        if self.kind in ("image", "sound"):
            return Binary(self.name)
        return Listed(self.name) if self.kind in ("words", "messages", "texts", "labels", "numbers") else self.name

    @property
    def is_text(self) -> bool:
        """Whether it is what the model reads."""
        return self.kind in ("text", "words", "messages", "image", "sound")


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
    *,
    grouped: bool = False,
) -> list[Row]:
    """Reads every row of a source, as :func:`checked_rows` gives them."""
    return list(checked_rows(reference, config, columns, note, grouped=grouped))


def checked_rows(
    reference: Reference,
    config: DataConfig,
    columns: Sequence[Column] | None = None,
    note: Callable[[str], None] | None = None,
    *,
    grouped: bool = False,
) -> Iterator[Row]:
    """The rows of a source, one at a time: those that are not left out, labels renamed (:class:`~jaxft.data.row_rules.RowRules`).

    Args:
      columns: which ones, in the order that their values are wanted in, texts first; None: text, pair if there is one, and label.
      note: told what was found out about files, how many rows were left out, and which labels were renamed.
      grouped: rows say their ``group``, which ``data.split_group`` is the column of.

    Raises:
      UserError: when the row that shows it is reached: no rows, a text that is not text, no text that is not empty, or a missing
        label.
    """
    columns = (*text_columns(config), label_column(config)) if columns is None else columns
    rules = RowRules(config, columns, shown(reference))
    wanted = tuple(column.wanted for column in columns)
    group = config.split_group if grouped else None
    place = wanted.index(group) if group in wanted else len(wanted)
    if group is not None and place == len(wanted):
        wanted = (*wanted, Group(group))
    for row in iter_rows(reference, wanted, form_of(config, note)):
        kept = rules.kept(row if group is None else _grouped(row, place, group, len(columns)))
        if kept is not None:
            yield kept
    rules.refuse_nothing()
    if note:
        for line in rules.lines():
            note(line)


def _grouped(row: Row, place: int, column: str, columns: int) -> Row:
    """The row with its group, and without the column that was read for it alone."""
    name = label_text(row.values[place])
    if not name:
        raise UserError(f"{row.where}: column {column!r} is empty; data.split_group needs a group for every row")
    return Row(row.values[:columns], row.where, name)


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
    while chunk := _chunk(remaining):
        yield first, chunk
        first += len(chunk)


def _chunk(rows: Iterator[Row]) -> list[Row]:
    found, size = list[Row](), 0
    for row in islice(rows, _CHUNK):
        found.append(row)
        size += sum(len(value) for value in row.values if isinstance(value, str))
        if size > _MOST_CHARACTERS:
            break
    return found
