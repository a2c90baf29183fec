"""Several texts in one row: what would be padding becomes training."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxft.data.batch import Example, Field, Fields
from jaxft.data.examples import Split, offsets_of, stable_order

_ROWS = 4096  # hashed together


TEXTS = "texts"
"""The axis of what is said of each text of a row: labels, weights, where it begins. Rows that hold fewer texts than others are padded."""
CLASSES = "classes"
"""The axis of what is said of each class: as long in every row."""
TARGET = "target"
"""The axis of what is to be written of each text: a row of pairs has a second side, packed beside the first."""
_PLACES = {"length": ("segments", "positions"), TARGET: ("target_segments", "target_positions")}
"""What packed rows say of the places of each side."""


def packed_fields(fields: Fields) -> Fields:
    """The fields of batches whose rows hold several texts each, from those of rows of one text.

    Fields of one value per text (or as many for each, along ``classes``) get the axis ``texts``, and so do weights; beside them is
    ``starts``, the place of each text's first token. Where rows have no such field (language models), weights stay those of rows. Rows
    that hold several texts already keep their fields of places: what is packed then is such rows, each with as many ``starts``. Pairs, of
    a text and what is to be written of it, have places on both sides.
    """
    places = {name: Field(("batch", axis)) for axis in sides_of(fields) for name in _PLACES[axis]}
    of_texts = {
        name: field._replace(axes=("batch", TEXTS, *field.axes[1:]))
        for name, field in fields.items()
        if not any(axis in _PLACES for axis in field.axes)
    }
    if set(of_texts) == {"weights"}:
        return {**fields, **places}
    return {**fields, "starts": Field(("batch", TEXTS)), **of_texts, **places}


def sides_of(fields: Fields) -> tuple[str, ...]:
    """The axes that texts lie one after the other along: ``length``, and ``target`` where they are pairs."""
    return tuple(axis for axis in _PLACES if axis == "length" or any(axis in field.axes for field in fields.values()))


class _Places(NamedTuple):
    """Some texts along a side, one after the other."""

    stored: np.ndarray
    """[tokens] where each lies in the split's column."""
    positions: np.ndarray
    """[tokens] of each in its text."""
    begun: np.ndarray
    """[texts] where each begins."""
    lengths: np.ndarray


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of several texts each, put together when they are asked for: the texts stay where they are.

    Rows carry ``segments`` (1, 2, ... by text) and ``positions`` (from 0 in each text), [tokens] int32; and ``starts`` (first token of
    each text), [texts] int32, where texts have fields of one value. Of pairs, ``target_segments`` and ``target_positions`` are those of
    what is to be written.
    """

    source: Split
    texts: np.ndarray
    """[texts] int: which ones, row after row."""
    first: np.ndarray
    """[rows + 1] int64: where each row's texts begin among them."""

    @property
    def name(self) -> str:
        """What messages call it: the name of the texts."""
        return self.source.name

    @property
    def fields(self) -> Fields:
        """Fields of the batches that its rows make."""
        return packed_fields(self.source.fields)

    def __len__(self) -> int:
        return len(self.first) - 1

    def sizes(self, axis: str) -> np.ndarray:
        """[rows] int64, tokens or ``texts`` of each."""
        if axis == TEXTS and TEXTS in self.fields["weights"].axes:
            return np.diff(self.first)
        if axis == CLASSES:
            return np.full(len(self), self._classes)
        return self._sizes[axis]

    @cached_property
    def _sizes(self) -> dict[str, np.ndarray]:
        """Tokens of each row, by side."""
        first = self.first[:-1]
        return {axis: np.add.reduceat(self.source.sizes(axis)[self.texts], first) for axis in self._sides}

    @cached_property
    def _sides(self) -> tuple[str, ...]:
        return sides_of(self.source.fields)

    @cached_property
    def _classes(self) -> int:
        return int(self.source.sizes(CLASSES)[0])

    def _of_texts(self, name: str, values: np.ndarray, texts: np.ndarray, places: dict[str, _Places]) -> np.ndarray:
        """The values of a field, of some texts: [tokens] of a side, [texts] or [texts, C]."""
        axis = self.source.axis(name)
        if axis == CLASSES:
            return values.reshape(-1, self._classes)[texts]
        return values[texts if axis is None else places[axis].stored]

    def _placed(self, axis: str, texts: np.ndarray) -> _Places:
        """Where some texts lie along a side, and where their tokens are stored."""
        starts, lengths = self.source.offsets[axis][texts], self.source.sizes(axis)[texts]
        ends = lengths.cumsum()
        positions = np.arange(ends[-1]) - (ends - lengths).repeat(lengths)
        return _Places(positions + starts.repeat(lengths), positions, ends - lengths, lengths)

    def __getitem__(self, index: int) -> Example:
        return self._rows(index, index + 1)

    def _rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Some rows, one after the other."""
        first = self.first[start : stop + 1]
        texts = self.texts[first[0] : first[-1]]
        places = {axis: self._placed(axis, texts) for axis in self._sides}
        found = {name: self._of_texts(name, values, texts, places) for name, values in self.source.columns.items()}
        numbers = np.arange(1, len(texts) + 1, dtype=np.int32)
        if stop > start + 1:
            numbers -= (first[:-1] - first[0]).repeat(np.diff(first)).astype(np.int32)
        begun, lengths = places["length"].begun, places["length"].lengths
        if "segments" in found:  # each has several texts itself, so many of them
            each = found["starts"].shape[1]
            found["starts"] = (found["starts"] + begun[:, None]).astype(np.int32)
            found["segments"] = (found["segments"] + ((numbers - 1) * each).repeat(lengths)).astype(np.int32)
            return found
        if TEXTS in self.fields["weights"].axes:
            found["starts"] = begun.astype(np.int32)
        for axis, side in places.items():
            segments, positions = _PLACES[axis]
            found[segments] = numbers.repeat(side.lengths)
            found[positions] = side.positions.astype(np.int32)
        return found

    def digest(self) -> str:
        """A hash of the texts, and of which ones share a row."""
        found = hashlib.sha256(self.source.digest().encode())
        found.update(np.ascontiguousarray(self.texts, np.int64).data)
        found.update(np.ascontiguousarray(self.first, np.int64).data)
        return f"packed-{found.hexdigest()}"

    def is_of(self, digest: str) -> bool:
        """Whether a digest is of these rows. Earlier versions hashed the tokens of the rows themselves, which reads all of them."""
        return digest == (self.digest() if digest.startswith("packed-") else self._hash_of_rows())

    def _hash_of_rows(self) -> str:
        found = hashlib.sha256(offsets_of(self.sizes("length")).data)
        for name in (*self.source.columns, "segments", "positions"):
            for start in range(0, len(self), _ROWS):
                part = self._rows(start, min(start + _ROWS, len(self)))[name]
                found.update(np.ascontiguousarray(part, self.fields[name].dtype).data)
        return found.hexdigest()


def pack(split: Split, length: int, target: int | None = None) -> Packed:
    """The texts of ``split`` in rows of up to ``length`` tokens: each goes, longest first, to the row that it fits most closely
    (best-fit decreasing; Krell et al. 2021 on packing for BERT).

    Which texts share a row depends on the texts alone, so that a packed split is read like any other: by (seed, step).

    Args:
      target: of pairs, the room for what is to be written; they go where they fit most closely on both sides.
    """
    if target is not None:
        texts, rows = best_fit_of_pairs(split.sizes("length"), split.sizes(TARGET), length, target)
        return Packed(split, texts[order := stable_order(rows)], offsets_of(np.bincount(rows[order])))
    lengths = split.sizes("length")
    order = stable_order(lengths.max() - lengths).astype(np.int32)
    rows = best_fit(np.bincount(lengths), length)
    texts = order[stable_order(rows)]
    return Packed(split, texts, offsets_of(np.bincount(rows)))


class _Open:
    """Rows that have room left, by how much: a stack for each amount, and the amounts in order."""

    def __init__(self) -> None:
        self.amounts: list[int] = []
        self._stacks: dict[int, list[np.ndarray]] = {}

    def push(self, left: int, rows: np.ndarray) -> None:
        """Rows that have so much room left; the last one will be taken first."""
        if len(rows) == 0 or left == 0:
            return
        stack = self._stacks.setdefault(left, [])
        if not stack:
            insort(self.amounts, left)
        stack.append(rows)

    def pop(self, left: int, most: int) -> np.ndarray:
        """Up to ``most`` of the rows that came last, the last one first."""
        stack, found = self._stacks[left], []
        while stack and most:
            top = stack.pop()
            if len(top) > most:
                stack.append(top[: len(top) - most])
            found.append(top[::-1][:most])
            most -= len(found[-1])
        if not stack:
            self.amounts.remove(left)
        return np.concatenate(found)


def best_fit(counts: np.ndarray, room: int) -> np.ndarray:
    """[texts] int32: the row of each text, longest first, of which ``counts[n]`` have n tokens; rows are numbered as they are begun.

    Texts of one length are placed together. A row that one of them goes to takes as many more as it has room for, for no
    other row that the next one fits in has less.
    """
    assigned = np.empty(int(counts.sum()), np.int32)
    rows = done = 0
    still = _Open()
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            place = bisect_left(still.amounts, size)
            fresh = place == len(still.amounts)
            amount = room if fresh else still.amounts[place]
            each = amount // size if size else left  # texts that such a row takes
            wanted = -(-left // each)
            if fresh:
                chosen, rows = np.arange(rows, rows + wanted, dtype=np.int32), rows + wanted
            else:
                chosen = still.pop(amount, wanted)
            taken = min(left, each * len(chosen))
            assigned[done : done + taken] = np.repeat(chosen, each)[:taken]
            done, left = done + taken, left - taken
            whole = taken // each
            still.push(amount - each * size, chosen[:whole])
            still.push(amount - (taken - whole * each) * size, chosen[whole:])
    return assigned


def best_fit_of_pairs(
    lengths: np.ndarray, targets: np.ndarray, room: int, target_room: int
) -> tuple[np.ndarray, np.ndarray]:
    """(texts, the row of each), both [pairs] int32: each pair goes, those that fill a side most first, to the row that is left the least
    room, both sides together as shares of theirs, of those that have room for it on both.

    Pairs of the same two lengths are placed together, and rows that have the same room left on both sides are one to choose: they are
    looked through once for each such two lengths, not for each pair.
    """
    share = np.maximum(lengths * target_room, targets * room).astype(np.int64)
    order = np.lexsort((targets, lengths, -share)).astype(np.int32)
    sizes = np.stack([lengths[order], targets[order]], 1).astype(np.int64)
    begins = np.flatnonzero(np.r_[True, (sizes[1:] != sizes[:-1]).any(1)])
    assigned, begun = np.empty(len(order), np.int32), 0
    still = _OpenPairs(room, target_room)
    for first, last in zip(begins.tolist(), [*begins[1:].tolist(), len(order)], strict=True):
        size, done = sizes[first], first
        while done < last:
            amount = still.closest(size)
            has = still.whole if amount is None else np.array(amount)
            each = min((int(all_of // one) for all_of, one in zip(has, size, strict=True) if one), default=last - done)
            wanted = -(-(last - done) // each)
            if amount is None:
                chosen, begun = np.arange(begun, begun + wanted, dtype=np.int32), begun + wanted
            else:
                chosen = still.pop(amount, wanted)
            taken = min(last - done, each * len(chosen))
            assigned[done : done + taken] = np.repeat(chosen, each)[:taken]
            done, full = done + taken, taken // each
            still.push(has - each * size, chosen[:full])
            still.push(has - (taken - full * each) * size, chosen[full:])
    return order, assigned


class _OpenPairs:
    """Rows of pairs that have room left, by how much on each side: a stack for each amount."""

    def __init__(self, room: int, target_room: int) -> None:
        self.whole = np.array([room, target_room], np.int64)
        self._shares = self.whole[::-1].copy()
        self._stacks: dict[tuple[int, int], list[np.ndarray]] = {}
        self._amounts = np.empty((0, 2), np.int64)

    def closest(self, size: np.ndarray) -> tuple[int, int] | None:
        """The least room that there is for a pair; None: a fresh row must be begun."""
        left = np.where((self._amounts >= size).all(1), self._amounts @ self._shares, np.iinfo(np.int64).max)
        place = int(left.argmin()) if len(left) else 0
        if not len(left) or left[place] == np.iinfo(np.int64).max:
            return None
        source, target = self._amounts[place].tolist()
        return source, target

    def push(self, left: np.ndarray, rows: np.ndarray) -> None:
        """Rows that have so much room left; the last one will be taken first."""
        if len(rows) == 0 or not left.all():
            return
        source, target = left.tolist()
        if (source, target) not in self._stacks:
            self._amounts = np.concatenate([self._amounts, left[None]])
        self._stacks.setdefault((source, target), []).append(rows)

    def pop(self, left: tuple[int, int], most: int) -> np.ndarray:
        """Up to ``most`` of the rows that came last together, the last one first."""
        stack = self._stacks[left]
        top = stack.pop()
        if len(top) > most:
            stack.append(top[: len(top) - most])
        if not stack:
            del self._stacks[left]
            self._amounts = self._amounts[(self._amounts != left).any(1)]
        return top[::-1][:most]
