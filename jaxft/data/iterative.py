"""Rows that have any number of labels, parted so that each part has its share of each label: iterative stratification (Sechidis,
Tsoumakas and Vlahavas 2011, "On the stratification of multi-label data").

Dims: R rows, L labels, E labels of all rows together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_PASSES = 20  # over all rows; few are moved after the first ones
_PAIRED = 256  # rows of each side that are looked at in pairs
_EPS = 1e-9


class Incidence(NamedTuple):
    """Which labels each row has."""

    labels: np.ndarray
    """[E] int32: those of the rows, one row's after the other's, each once."""
    ends: np.ndarray
    """[R] int64: the place behind each row's last one."""
    count: int
    """L."""

    @property
    def rows(self) -> np.ndarray:
        """[E] the row that each label is of."""
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))

    def of(self, chosen: np.ndarray) -> np.ndarray:
        """[L] int64: how many rows have each label, of those that a mask [R] is true for."""
        return np.bincount(self.labels[chosen[self.rows]], minlength=self.count)


def stratified(rows: Incidence, shares: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """[R] int8: 0 for rows that are kept, i for those of the i-th share; one share is taken after the other, so that a further one changes
    nothing in those before it.

    The label that the fewest rows which are not parted yet have comes first: each of its rows goes to the side that lacks it most, and
    counts there for all its labels. Rare labels, which later rows could not make up for, so get their shares, and frequent ones
    make up for what rows with rare ones did to them. Rows then change sides, alone or in pairs, as long as that brings the sum over
    labels of squared distances from their shares down. The last row of a label is kept.

    Args:
      rows: of which each has one label at least, for instance one that all of them have.
    """
    totals = np.bincount(rows.labels, minlength=rows.count)
    part, order = np.zeros(len(rows.ends), np.int8), rng.permutation(len(rows.ends))
    for place, share in enumerate(shares, start=1):
        sides = _Sides(rows, part == 0, share * totals)
        sides.fill(order)
        sides.improve(order)
        part[sides.taken] = place
    return part


def deviations(rows: Incidence, shares: Sequence[float], part: np.ndarray) -> np.ndarray:
    """[shares, L] how many rows more than its share each part has of each label."""
    totals = np.bincount(rows.labels, minlength=rows.count)
    return np.stack([rows.of(part == place) - share * totals for place, share in enumerate(shares, start=1)])


class _Sides:
    """Which of some rows are taken, and which are kept."""

    def __init__(self, rows: Incidence, free: np.ndarray, wanted: np.ndarray) -> None:
        """
        Args:
          rows: all of them.
          free: [R] bool: those to be parted.
          wanted: [L] how many of them should be taken.
        """
        self._rows, self._free = rows, free
        self._labels = np.split(rows.labels, rows.ends[:-1])
        self._left = rows.of(free)  # of those that are not parted yet
        self._kept = np.zeros(rows.count, np.int64)
        self._missing = wanted.astype(np.float64)  # to be taken yet
        self.taken = np.zeros(len(free), bool)

    def fill(self, order: np.ndarray) -> None:
        """Parts the rows, label by label."""
        by_label = self._by_label(order)
        waiting, fewest = self._free.copy(), [(int(n), i) for i, n in enumerate(self._left) if n]
        heapq.heapify(fewest)
        while fewest:
            count, label = heapq.heappop(fewest)
            if count != self._left[label]:  # some went with other labels since
                if self._left[label]:
                    heapq.heappush(fewest, (int(self._left[label]), label))
                continue
            for row in by_label[label]:
                if waiting[row]:
                    waiting[row] = False
                    self._put(row, label)

    def _by_label(self, order: np.ndarray) -> list[list[int]]:
        """The rows of each label, in an order [R] of all of them."""
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        of_labels = self._rows.rows
        sorting = np.lexsort((place[of_labels], self._rows.labels))
        ends = np.cumsum(np.bincount(self._rows.labels, minlength=self._rows.count))
        return [rows.tolist() for rows in np.split(of_labels[sorting], ends[:-1])]

    def _put(self, row: int, label: int) -> None:
        labels = self._labels[row]
        missing = self._missing[label]
        take = missing > self._left[label] - missing
        if take and not ((self._kept[labels] > 0) | (self._left[labels] > 1)).all():
            take = False
        self._left[labels] -= 1
        if take:
            self.taken[row] = True
            self._missing[labels] -= 1
        else:
            self._kept[labels] += 1

    def improve(self, order: np.ndarray) -> None:
        """Lets rows change sides, and pairs of rows swap theirs, while the sum of squares of what is missing goes down by it."""
        for _ in range(_PASSES):
            worse = self._worse(order)
            better = order[(self._free & (worse < -_EPS))[order]]
            moved = [self._change(row) for row in better[np.argsort(worse[better], kind="stable")].tolist()]
            if not any(moved):
                moved = [self._change(*pair) for pair in self._pairs(order, worse)]
            if not any(moved):
                break

    def _worse(self, order: np.ndarray) -> np.ndarray:
        """[R] what the sum of squares grows by if a row changes sides. One that is taken makes each of its labels' missing m to m - 1,
        and so m * m larger by 1 - 2 m; one given back, by 1 + 2 m."""
        rows = self._rows.rows
        signed = np.where(self.taken[rows], 1.0, -1.0) * self._missing[self._rows.labels]
        return np.bincount(rows, 1 + 2 * signed, len(order))

    def _pairs(self, order: np.ndarray, worse: np.ndarray) -> list[tuple[int, int]]:
        """Taken and kept rows, few of each, whose swap would help, those that it would help most first."""
        mixed = order[np.argsort(worse[order], kind="stable")]
        taken, kept = (mixed[(self._free & side)[mixed]][:_PAIRED] for side in (self.taken, ~self.taken))
        both = self._marks(taken) @ self._marks(kept).T  # what one gives and the other takes does not change
        change = worse[taken][:, None] + worse[kept] - 2 * both
        first, second = np.nonzero(change < -_EPS)
        best = np.argsort(change[first, second], kind="stable")[:_PAIRED]
        return list(zip(taken[first[best]].tolist(), kept[second[best]].tolist(), strict=True))

    def _marks(self, chosen: np.ndarray) -> np.ndarray:
        """[rows, L] 1 for each label of a row."""
        marks = np.zeros((len(chosen), self._rows.count))
        for i, row in enumerate(chosen.tolist()):
            marks[i, self._labels[row]] = 1
        return marks

    def _change(self, *rows: int) -> bool:
        """Lets rows change sides if that still helps, and leaves each label a row."""
        more = np.zeros(self._rows.count, np.int64)
        for row in rows:
            more[self._labels[row]] += 1 if self.taken[row] else -1
        if (
            float((more * (more + 2 * self._missing)).sum()) >= -_EPS
            or (self._kept + more < np.minimum(self._kept, 1)).any()
        ):
            return False
        for row in rows:
            self.taken[row] = not self.taken[row]
        self._missing += more
        self._kept += more
        return True
