"""Rows of a corpus, put together when they are asked for: concatenated and cut, or documents whole, as many as fit.

Rows are numbered from 0 without end: those of an epoch, in its order, then those of the next. Which tokens a row holds follows from its
number and the seed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32, Int64

from jaxft.data.corpus.order import permuted, uniforms
from jaxft.data.corpus.store import Corpus
from jaxft.data.examples import offsets_of, stable_order
from jaxft.data.packing import best_fit

_WINDOW = 32  # rows' worth of tokens that lie together: long enough for disks, short enough for a good shuffle
_GROUP = 128  # windows whose documents are packed together: 4096 rows or so
_TOGETHER = 1 << 12  # blocks whose order is computed together
_SPARE = 0.005  # of a group's rows: groups differ


class Rewriting(Protocol):
    """What becomes of a document, or a piece of a long one, when it is read."""

    @property
    def room(self) -> int:
        """By how many tokens it may become longer."""
        ...

    def said(self) -> list[object]:
        """What it does, as plain JSON: equal where it does the same."""
        ...

    def __call__(self, tokens: Int32[np.ndarray, " n"], draws: Iterator[float]) -> Int32[np.ndarray, " m"]:
        """The tokens that are read instead of these; ``draws`` are random numbers from 0 to 1."""
        ...


class Source(Protocol):
    """Rows of up to ``length`` tokens, of one corpus."""

    @property
    def length(self) -> int:
        """Tokens that a row has room for."""
        ...

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        ...

    def said(self) -> list[object]:
        """What becomes of documents when they are read, as plain JSON; empty: nothing."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest document that is in one row, whole."""
        ...


class Rows(Source, Protocol):
    """Rows of documents, several in each."""

    @property
    def rewriting(self) -> Rewriting | None:
        """What becomes of documents when they are read."""
        ...

    def fill(
        self,
        rows: Int64[np.ndarray, " B"],
        seed: int | None,
        tokens: Int32[np.ndarray, "B S"],
        begins: Int32[np.ndarray, "B S"],
    ) -> Int64[np.ndarray, " B"]:
        """Writes rows; how many tokens each has.

        Args:
          rows: their numbers.
          seed: of the order; None: as the corpus has them.
          tokens: where they are written.
          begins: where 1 is written for tokens that begin a document, or what is left of one.
        """
        ...


@dataclass(frozen=True, eq=False)
class Concatenated:
    """The stream of all documents, cut every ``length`` tokens. The last row of an epoch's stream may be shorter."""

    corpus: Corpus
    length: int
    rewriting: None = None

    def said(self) -> list[object]:
        """Documents stay as they are."""
        return []

    @property
    def longest(self) -> int:
        """A document that does not happen to be cut."""
        return self.length

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return -(-self.corpus.tokens // self.length)

    def fill(
        self,
        rows: Int64[np.ndarray, " B"],
        seed: int | None,
        tokens: Int32[np.ndarray, "B S"],
        begins: Int32[np.ndarray, "B S"],
    ) -> Int64[np.ndarray, " B"]:
        """Writes rows; see :class:`Rows`."""
        sizes = np.full(len(rows), self.length, np.int64)
        for i, row in enumerate(rows.tolist()):
            epoch, place = divmod(row, self.count)
            block = place if seed is None else order_of(self.count, seed, epoch, place)
            start = block * self.length
            if (left := self.corpus.tokens - start) < self.length:
                sizes[i] = left
            self.corpus.fill(start, tokens[i, : sizes[i]], begins[i])
        return sizes


def order_of(count: int, seed: int, epoch: int, place: int) -> int:
    """Which of ``count`` rows is read at a place of an epoch."""
    return int(_order_of(count, seed, epoch, place // _TOGETHER)[place % _TOGETHER])


@functools.lru_cache(maxsize=64)
def _order_of(count: int, seed: int, epoch: int, part: int) -> np.ndarray:
    """Some of an epoch's blocks, in its order: a few thousand together cost little more than one."""
    return permuted(np.arange(part * _TOGETHER, min((part + 1) * _TOGETHER, count)), count, (seed, epoch))


class _Group(NamedTuple):
    """Documents, or pieces of long ones, that share rows."""

    starts: np.ndarray
    """[pieces] int64, the first token of each in the stream, row after row."""
    sizes: np.ndarray
    whole: np.ndarray
    """Whether there is room for what a rewriting adds to it."""
    first: np.ndarray
    """[rows + 1] int64, where the pieces of each row begin."""


@dataclass(frozen=True, eq=False)
class BestFit:
    """Documents whole, each in the row that it fits most closely; those of more than ``length`` tokens in pieces.

    The stream is cut into windows of documents; as many windows of an epoch's order as make a group are packed together, into rows that
    are then shuffled. Each group has the same number of rows, so that a row is found without a table: what is left of a group that
    packs less well than was foreseen is cut to fill what room there is.

    Where documents are rewritten as they are read, each has room for what that adds; those that are cut to fill gaps stay as they are. What
    is drawn follows from the seed, the epoch and the document's place in the corpus.
    """

    corpus: Corpus
    length: int
    rewriting: Rewriting | None = None

    def said(self) -> list[object]:
        """What the rewriting says of itself."""
        return [] if self.rewriting is None else self.rewriting.said()

    @property
    def _room(self) -> int:
        return 0 if self.rewriting is None else self.rewriting.room

    @property
    def longest(self) -> int:
        """Tokens of the longest piece."""
        return self.length - self._room

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return self.groups * self.group_rows

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return _WINDOW * self.length

    @property
    def windows(self) -> int:
        """Windows of the stream."""
        return -(-self.corpus.tokens // self.window)

    @property
    def groups(self) -> int:
        """Groups of an epoch."""
        return -(-self.windows // _GROUP)

    @functools.cached_property
    def group_rows(self) -> int:
        """Rows of a group: as many as documents of the lengths that the whole corpus has take, and a few more."""
        counts = self.piece_counts
        if self.groups == 1:
            return int(best_fit(counts, self.length).max()) + 1
        tokens = -(-self.windows // self.groups) * self.window
        # Rounded down together, so that no length is lost to rounding.
        ends = np.floor(np.cumsum(counts) * (tokens / self.corpus.tokens)).astype(np.int64)
        scaled = np.diff(ends, prepend=0)
        rows = int(best_fit(scaled, self.length).max()) + 1
        tokens += self._room * int(scaled.sum())
        return max(-(-tokens // self.length), rows + int(np.ceil(rows * _SPARE)))

    @functools.cached_property
    def piece_counts(self) -> np.ndarray:
        """[length + 1] how many documents, or pieces of long ones, have how many tokens, with what a rewriting may add."""
        sizes, counts = self.corpus.lengths.T
        found = np.bincount(sizes % self.longest, counts, self.longest + 1).astype(np.int64)
        found[self.longest] += int((sizes // self.longest * counts).sum())
        found[0] = 0
        return np.concatenate([np.zeros(self._room, np.int64), found])

    def fill(
        self,
        rows: Int64[np.ndarray, " B"],
        seed: int | None,
        tokens: Int32[np.ndarray, "B S"],
        begins: Int32[np.ndarray, "B S"],
    ) -> Int64[np.ndarray, " B"]:
        """Writes rows; see :class:`Rows`."""
        sizes = np.zeros(len(rows), np.int64)
        numbers, within = np.divmod(rows, self.group_rows)
        for i, (number, row) in enumerate(zip(numbers.tolist(), within.tolist(), strict=True)):
            group, at = _group_of(self, seed, number), 0
            pieces = slice(*group.first[row : row + 2])
            for start, size, whole in zip(*(some[pieces].tolist() for some in group[:3]), strict=True):
                begins[i, at] = 1
                if self.rewriting is None or not whole:
                    self.corpus.copy(start, tokens[i, at : at + size])
                else:
                    size = self._rewrite(
                        start, size, (0, 0) if seed is None else (seed, number // self.groups), tokens[i, at:]
                    )
                at += size
            sizes[i] = at
        return sizes

    def _rewrite(self, start: int, size: int, key: tuple[int, int], out: np.ndarray) -> int:
        """Writes what becomes of a piece; how many tokens that are."""
        assert self.rewriting is not None
        found = np.empty(size, np.int32)
        self.corpus.copy(start, found)
        made = self.rewriting(found, uniforms((*key, start)))
        out[: len(made)] = made
        return len(made)

    def group(self, seed: int | None, number: int) -> _Group:
        """A group of some epoch."""
        epoch, group = divmod(number, self.groups)
        first, last = (self.windows * one // self.groups for one in (group, group + 1))
        windows = np.arange(first, last)
        if seed is not None:
            windows = permuted(windows, self.windows, (seed, epoch))
        starts, sizes = self._pieces(windows)
        sizes += self._room
        order = stable_order(self.length - sizes)
        starts, sizes = starts[order], sizes[order]
        rows = best_fit(np.bincount(sizes, minlength=self.length + 1), self.length).astype(np.int64)
        starts, sizes, rows, whole = _fitted(starts, sizes, rows, self.group_rows, self.length, self._room)
        if seed is not None:
            rows = np.random.default_rng([seed, epoch, group]).permutation(self.group_rows)[rows]
        order = np.argsort(rows, kind="stable")
        return _Group(
            starts[order], sizes[order], whole[order], offsets_of(np.bincount(rows, minlength=self.group_rows))
        )

    def _pieces(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(starts, sizes) of the documents, or pieces of long ones, that begin in some windows."""
        found = []
        for window in windows.tolist():
            start, stop = window * self.window, min((window + 1) * self.window, self.corpus.tokens)
            first, last = self.corpus.documents_in(start, stop)
            counts = -(-(last - first) // self.longest)
            number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            starts = np.repeat(first, counts) + number * self.longest
            sizes = np.minimum(np.repeat(last, counts) - starts, self.longest)
            inside = (starts >= start) & (starts < stop)
            found.append((starts[inside], sizes[inside]))
        starts, sizes = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return starts, sizes


@functools.lru_cache(maxsize=8)
def _group_of(rows: BestFit, seed: int | None, number: int) -> _Group:
    return rows.group(seed, number)


def _fitted(
    starts: np.ndarray, sizes: np.ndarray, rows: np.ndarray, count: int, length: int, spare: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of a group in ``count`` rows: those beyond are cut to fill what room there is; rows that would be empty get one.

    Args:
      sizes: with the ``spare`` tokens that each may become longer by. Those that are given, and said to have room for that, are without.
    """
    beyond = rows >= count
    kept, held = ~beyond, np.bincount(rows[~beyond], minlength=count)
    room = length - np.bincount(rows[kept], sizes[kept], count).astype(np.int64)
    more: list[tuple[int, int, int]] = []
    order = np.argsort(-room, kind="stable").tolist()
    place = 0
    for start, size in zip(starts[beyond].tolist(), (sizes[beyond] - spare).tolist(), strict=True):
        while size:
            row = order[place]
            taken = min(size, int(room[row]))
            if taken:
                more.append((start, taken, row))
                start, size, room[row] = start + taken, size - taken, room[row] - taken
                held[row] += 1
            place += not room[row]
    starts, sizes, rows = starts[kept], sizes[kept] - spare, rows[kept].copy()
    for row in np.flatnonzero(held == 0).tolist():
        crowded = np.flatnonzero(held[rows] > 1)
        if not len(crowded):
            break
        held[rows[crowded[-1]]] -= 1
        rows[crowded[-1]] = row
        held[row] = 1
    added = np.array(more, np.int64).reshape(-1, 3).T
    whole = np.arange(len(starts) + len(more)) < len(starts)
    first, second, third = (np.concatenate(both) for both in zip((starts, sizes, rows), added, strict=True))
    return first, second, third, whole
