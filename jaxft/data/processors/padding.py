"""Rows of token ids as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from jaxft.errors import UserError


def pad_rows(
    tokens: Sequence[Sequence[int]], types: Sequence[Sequence[int]], length: int | None, pad_id: int
) -> dict[str, Int32[np.ndarray, "B S"]]:
    """Ragged rows as [B, S] int32 arrays ``tokens``, ``mask`` and ``types``; S is ``length`` or that of the longest row."""
    width = max(map(len, tokens), default=1) if length is None else length
    out = {name: np.zeros((len(tokens), width), np.int32) for name in ("tokens", "mask", "types")}
    out["tokens"][:] = pad_id
    for i, (ids, kinds) in enumerate(zip(tokens, types, strict=True)):
        out["tokens"][i, : len(ids)] = ids
        out["types"][i, : len(ids)] = kinds
        out["mask"][i, : len(ids)] = 1
    return out


def padded_length(longest: int, length: int | None, buckets: Sequence[int] | None) -> int:
    """The width of rows of which the longest has so many tokens.

    Raises:
      UserError: it does not fit, or both are given.
    """
    if length is not None and buckets is not None:
        raise UserError(f"length={length}, buckets={list(buckets)}: give one of the two")
    widths = sorted(buckets) if buckets is not None else [longest if length is None else length]
    found = next((width for width in widths if width >= longest), None)
    if found is None:
        raise UserError(
            f"a row has {longest} tokens, more than {widths[-1] if widths else 0}; load the tokenizer with max_length to truncate"
        )
    return found
