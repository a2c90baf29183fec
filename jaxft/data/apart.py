"""Rows dealt into batches so that no batch holds a value twice, by exchanging rows between batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Values = Callable[[int], frozenset[int]]
"""The values of a row that no batch may hold twice."""


def keep_apart(batches: Sequence[np.ndarray], values: Values) -> list[np.ndarray]:
    """Batches of the same sizes and the same rows, where rows that share a value are in different batches.

    A row that shares a value with another of its batch changes places with a row of the nearest batch that leaves both
    without; so where batches are in order of length, lengths move little. Which rows change is a function of the batches
    alone. A value that more rows have than there are batches stays twice in some.

    Args:
      batches: [rows] row numbers of each.
      values: of a row, by its number.
    """
    found = [batch.copy() for batch in batches]
    held = {int(row): values(int(row)) for batch in found for row in batch}
    counts = [Counter(value for row in batch.tolist() for value in held[row]) for batch in found]
    for here, batch in enumerate(found):
        for place in range(len(batch)):
            if any(counts[here][value] > 1 for value in held[int(batch[place])]):
                _exchange(found, counts, held, here, place)
    return found


def _exchange(
    batches: list[np.ndarray], counts: list[Counter[int]], held: dict[int, frozenset[int]], here: int, place: int
) -> None:
    """Changes places with the first row, of the nearest batch, that fits; leaves all as it is if none does."""
    row = int(batches[here][place])
    mine = held[row]
    for there in _outwards(here, len(batches)):
        if any(counts[there][value] for value in mine):
            continue
        for other_place, other in enumerate(batches[there].tolist()):
            theirs = held[other]
            if any(counts[here][value] > (value in mine) for value in theirs):
                continue
            batches[here][place], batches[there][other_place] = other, row
            counts[here].subtract(mine)
            counts[here].update(theirs)
            counts[there].subtract(theirs)
            counts[there].update(mine)
            return


def _outwards(start: int, count: int) -> Iterator[int]:
    """The other numbers below ``count``, those next to ``start`` first."""
    for distance in range(1, count):
        for number in (start - distance, start + distance):
            if 0 <= number < count:
                yield number
