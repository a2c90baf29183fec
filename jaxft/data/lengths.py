"""How long the texts of a split are before truncation, and which ``data.max_length`` would fit them."""

from __future__ import annotations

import numpy as np

from jaxft.data.examples import Split
from jaxft.data.loader import bucket_of

_FEW = 0.01  # of all rows: so many may be cut before a longer limit is proposed
_SPARE = 1.5  # times the longest text: padding beyond that is worth a word


def whole_lengths(split: Split) -> np.ndarray:
    """[rows] tokens per row, those that were cut off included."""
    lengths = split.sizes("length")
    return lengths if split.dropped is None else lengths + split.dropped


def lengths_text(split: Split, max_length: int, rows: int | None = None) -> str:
    """Rows, tokens, lengths before truncation and what truncation cut, on one line.

    Args:
      rows: that its examples are of; None: as many as there are examples.
    """
    lengths = whole_lengths(split)
    median, most, nearly_all = (int(np.percentile(lengths, share, method="higher")) for share in (50, 95, 99))
    cut = f"{split.truncated} truncated to {max_length}"
    if split.truncated > 0:
        cut += f" ({split.truncated / len(split):.2%})"
    return (
        f"{counted(len(split), rows)}, {split.sizes('length').sum()} tokens; median {median}, 95 % {most}, 99 % {nearly_all}, "
        f"max {lengths.max()}; {cut}"
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
    lengths = whole_lengths(split)
    if split.truncated > _FEW * len(split):
        wanted = _rounded(int(np.percentile(lengths, 99, method="higher")))
        best = wanted if limit is None else min(wanted, limit)
        share = f"{split.truncated / len(split):.1%} of rows cut at {max_length} tokens"
        if best <= max_length:
            return f"note: {share}, which is as many as the model can take"
        held = float((lengths <= best).mean())
        of_limit = " (the model's limit)" if best == limit else ""
        return f"note: {share}; data.max_length={best}{of_limit} holds {held:.1%} whole"
    longest, fits = int(lengths.max()), _rounded(int(lengths.max()))
    if len(buckets) > 0 and bucket_of(min(longest, buckets[-1]), buckets) >= _SPARE * fits:
        return (
            f"note: the longest training row has {longest} tokens and is padded to {bucket_of(longest, buckets)}; "
            f"data.max_length={fits} (and data.buckets left out) would be less work"
        )
    return None


def _rounded(length: int) -> int:
    """The next multiple of 16."""
    return -(-length // 16) * 16
