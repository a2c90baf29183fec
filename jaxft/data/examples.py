"""Encoded rows: what a split is to those who make batches of it, and a split whose arrays lie in memory or are memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from jaxft.data.batch import Example, Field, Fields


class Encoded(NamedTuple):
    """An example, and where it comes from."""

    example: Example
    row: int
    """Index of its row."""
    dropped: int = 0
    """Tokens of the row that were cut off and are in no other example."""
    origin: object = None
    """What a task needs to answer in the row's own terms, for instance a :class:`~jaxft.data.processors.tokenizer.Window`."""


class Examples(Protocol):
    """Encoded rows, wherever they lie."""

    @property
    def name(self) -> str:
        """What messages call it, for instance ``train``."""
        ...

    @property
    def fields(self) -> Fields:
        """Fields of the batches that its rows make."""
        ...

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def sizes(self, axis: str) -> np.ndarray:
        """[examples] how long each is along an axis; made once, never per batch."""
        ...

    def __getitem__(self, index: int) -> Example:
        """One example, unpadded."""
        ...

    def digest(self) -> str:
        """A hash of all examples, in order."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """Examples as one array per field. A field with a named axis is ragged: example i holds ``columns[name][offsets[i]:offsets[i + 1]]``,
    with the offsets of that axis; of any other field, ``columns[name][i]``.
    """

    name: str
    fields: Fields
    columns: Mapping[str, np.ndarray]
    """Values of the fields that rows store, by name. Integers may be narrower than the field says; batches have the field's type."""
    offsets: Mapping[str, np.ndarray]
    """[examples + 1] int64 for each named axis."""
    dropped: np.ndarray | None = None
    """[examples] integers, tokens that were cut off; None: not known (rows that were chosen)."""

    def __len__(self) -> int:
        if self.offsets:
            return len(next(iter(self.offsets.values()))) - 1
        return len(next(iter(self.columns.values())))

    def sizes(self, axis: str) -> np.ndarray:
        """[examples] int64, how long each is along an axis."""
        return self._sizes[axis]

    @cached_property
    def _sizes(self) -> dict[str, np.ndarray]:
        return {axis: np.diff(offsets) for axis, offsets in self.offsets.items()}

    @property
    def truncated(self) -> int:
        """Examples that were cut; -1: not known."""
        return -1 if self.dropped is None else int((self.dropped > 0).sum())

    def axis(self, name: str) -> str | None:
        """The named axis that a stored field is ragged along; None: it has one value per example."""
        return ragged_axis(self.fields[name])

    def __getitem__(self, index: int) -> Example:
        found = {}
        for name, values in self.columns.items():
            axis = self.axis(name)
            if axis is None:
                found[name] = values[index]
            else:
                start, stop = self.offsets[axis][index : index + 2]
                found[name] = values[start:stop]
        return found

    def parts(self, examples: int) -> Iterator[Split]:
        """The same examples, so many at a time, as views."""
        for first in range(0, len(self), examples):
            last = min(first + examples, len(self))
            offsets = {axis: ends[first : last + 1] for axis, ends in self.offsets.items()}
            columns = {}
            for name, values in self.columns.items():
                axis = self.axis(name)
                columns[name] = values[first:last] if axis is None else values[offsets[axis][0] : offsets[axis][-1]]
            dropped = None if self.dropped is None else self.dropped[first:last]
            begun = {axis: ends - ends[0] for axis, ends in offsets.items()}
            yield Split(self.name, self.fields, columns, begun, dropped)

    def digest(self) -> str:
        """A hash of all examples, in order."""
        found = hashlib.sha256()
        for array in (*self.offsets.values(), *self.columns.values()):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


def ragged_axis(field: Field) -> str | None:
    """The named axis that rows differ in; None: every row has as many values of the field."""
    return field.axes[1] if len(field.axes) > 1 and isinstance(field.axes[1], str) else None


def make_split(name: str, encoded: Iterable[Encoded], fields: Fields) -> Split:
    """The split of encoded rows.

    Args:
      fields: that its batches may have: those that the examples store, and those with a ``value`` of their own.
    """
    parts: dict[str, list[np.ndarray]] = {}
    dropped: list[int] = []
    for one in encoded:
        parts = parts or {name: [] for name in fields if name in one.example}
        for field, values in parts.items():
            values.append(one.example[field])
        dropped.append(one.dropped)
    fields = {name: field for name, field in fields.items() if name in parts or field.value is not None}
    columns, offsets = {}, {}
    for field, values in parts.items():
        kind = fields[field]
        axis = ragged_axis(kind)
        if axis is None:
            columns[field] = np.array(values, kind.dtype)
            continue
        offsets.setdefault(axis, offsets_of(np.array([len(value) for value in values], np.int64)))
        columns[field] = np.concatenate(values).astype(kind.dtype, copy=False) if values else np.zeros(0, kind.dtype)
    return Split(name, fields, columns, offsets, np.array(dropped, np.int64))


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """[n + 1] where ragged entries of these sizes begin, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def stable_order(values: np.ndarray) -> np.ndarray:
    """The indices that sort integers >= 0, equal ones in their order. Sixteen bits at a time, which numpy sorts in linear time."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    shift = 16
    while len(values) and int(values.max()) >> shift:
        order = order[np.argsort((values[order] >> shift & 0xFFFF).astype(np.uint16), kind="stable")]
        shift += 16
    return order
