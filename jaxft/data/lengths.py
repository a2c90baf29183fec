"""How long the texts of a split are before truncation, and which ``data.max_length`` would fit them."""

from __future__ import annotations

import numpy as np

from jaxft.data.examples import Split
from jaxft.data.loader import bucket_of

_ROWS = 1 << 20  # looked at together, so that no array of all rows is made beside their sizes
_FEW = 0.01  # of all rows: so many may be cut before a longer limit is proposed
_SPARE = 1.5  # times the longest text: padding beyond that is worth a word


class Lengths:
    """How many rows have how many tokens, those that were cut off included."""

    def __init__(self, split: Split) -> None:
        self._counts = np.zeros(1, np.int64)
        sizes = split.sizes("length")
        for first in range(0, len(sizes), _ROWS):
            part = sizes[first : first + _ROWS]
            found = np.bincount(part if split.dropped is None else part + split.dropped[first : first + _ROWS])
            wide = np.zeros(max(len(found), len(self._counts)), np.int64)
            wide[: len(found)] += found
            wide[: len(self._counts)] += self._counts
            self._counts = wide

    def percentile(self, share: float) -> int:
        """The least length that so many percent of the rows do not exceed, as numpy's ``percentile`` with ``method="higher"``."""
        place = int(np.ceil((int(self._counts.sum()) - 1) * (share / 100)))
        return int(np.searchsorted(self._counts.cumsum(), place, side="right"))

    @property
    def longest(self) -> int:
        """The most tokens that a row has."""
        return int(np.flatnonzero(self._counts)[-1])

    def share_within(self, length: int) -> float:
        """The share of rows of at most so many tokens."""
        return int(self._counts[: length + 1].sum()) / int(self._counts.sum())


def lengths_text(split: Split, max_length: int, rows: int | None = None) -> str:
    """Rows, tokens, lengths before truncation and what truncation cut, on one line.

    Args:
      rows: that its examples are of; None: as many as there are examples.
    """
    lengths, truncated = Lengths(split), split.truncated
    median, most, nearly_all = (lengths.percentile(share) for share in (50, 95, 99))
    cut = f"{truncated} truncated to {max_length}"
    if truncated > 0:
        cut += f" ({truncated / len(split):.2%})"
    return (
        f"{counted(len(split), rows)}, {split.sizes('length').sum()} tokens; median {median}, 95 % {most}, 99 % {nearly_all}, "
        f"max {lengths.longest}; {cut}"
    )


def counted(examples: int, rows: int | None) -> str:
    """How many rows there are, and how many examples they make if that is another number."""
    return f"{examples} rows" if rows in (None, examples) else f"{rows} rows in {examples} parts"


def advice(split: Split, max_length: int, buckets: tuple[int, ...], limit: int | None) -> str | None:
    """A proposal for ``data.max_length``, if more than 1 % of the rows are cut, or if rows are padded far beyond the longest.

    Args:
      buckets: padded lengths that batches may have.
      limit: tokens that the model can take; None: any number.
    """
    lengths, truncated = Lengths(split), split.truncated
    if truncated > _FEW * len(split):
        wanted = _rounded(lengths.percentile(99))
        best = wanted if limit is None else min(wanted, limit)
        share = f"{truncated / len(split):.1%} of rows cut at {max_length} tokens"
        if best <= max_length:
            return f"note: {share}, which is as many as the model can take"
        held = lengths.share_within(best)
        of_limit = " (the model's limit)" if best == limit else ""
        return f"note: {share}; data.max_length={best}{of_limit} holds {held:.1%} whole"
    longest, fits = lengths.longest, _rounded(lengths.longest)
    if len(buckets) > 0 and bucket_of(min(longest, buckets[-1]), buckets) >= _SPARE * fits:
        return (
            f"note: the longest training row has {longest} tokens and is padded to {bucket_of(longest, buckets)}; "
            f"data.max_length={fits} (and data.buckets left out) would be less work"
        )
    return None


def _rounded(length: int) -> int:
    """The next multiple of 16."""
    return -(-length // 16) * 16
