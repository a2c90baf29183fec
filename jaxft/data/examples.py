"""Encoded rows: what a split is to those who make batches of it, and a split that lies in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxft.data.batch import Example, Fields


class Encoded(NamedTuple):
    """An example, and where it comes from."""

    example: Example
    row: int
    """Index of its row."""
    dropped: int = 0
    """Tokens of the row that were cut off and are in no other example."""
    origin: Any = None
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
    """Examples in memory. A field with a named axis is ragged: example i holds ``columns[name][offsets[i]:offsets[i + 1]]``, with
    the offsets of that axis; of any other field, ``columns[name][i]``.
    """

    name: str
    fields: Fields
    columns: Mapping[str, np.ndarray]
    """Values of the fields that rows store, by name."""
    offsets: Mapping[str, np.ndarray]
    """[examples + 1] int64 for each named axis."""
    dropped: np.ndarray | None = None
    """[examples] int64, tokens that were cut off; None: not known (rows that were chosen or packed)."""

    def __len__(self) -> int:
        return len(next(iter(self.offsets.values()))) - 1

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
        axes = self.fields[name].axes
        return axes[1] if len(axes) > 1 and isinstance(axes[1], str) else None

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

    def digest(self) -> str:
        """A hash of all examples, in order."""
        found = hashlib.sha256()
        for array in (*self.offsets.values(), *self.columns.values()):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


def make_split(name: str, encoded: Iterable[Encoded], fields: Fields) -> Split:
    """The split of encoded rows.

    Args:
      fields: that its batches may have: those that the examples store, and those with a ``value`` of their own.
    """
    parts: dict[str, list[Any]] = {}
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
        if len(kind.axes) == 1:
            columns[field] = np.array(values, kind.dtype)
            continue
        offsets.setdefault(kind.axes[1], offsets_of(np.array([len(value) for value in values], np.int64)))
        columns[field] = np.concatenate(values).astype(kind.dtype, copy=False) if values else np.zeros(0, kind.dtype)
    return Split(name, fields, columns, offsets, np.array(dropped, np.int64))


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """[n + 1] where ragged entries of these sizes begin, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def spans_of(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The indices that the ragged entries of some rows have, one after the other."""
    return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in rows] or [np.zeros(0, np.int64)])
