"""Which key each query may see: mask *data*, never a mask array.

Dims: B batch, S query length, T key length.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskSpec:
    """Which key each query may see. A backend that cannot honour a part of it must refuse, not ignore it."""

    padding: Array | None = None
    """[B, T] bool, False where a key is padding. Padding queries see the same keys as others; their result is unused."""
    segments: Array | None = None
    """[B, S] int32, for packed rows: a token sees only its own segment; 0 is padding and sees nothing."""
    causal: bool = field(default=False, metadata={"static": True})
    """A token sees only itself and those before it in the row."""

    def allowed(self, length: int) -> Array | None:
        """[B or 1, 1, 1 or S, T] bool for rows of ``length`` S = T, or None if everything may be seen."""
        place = jnp.arange(length)
        return allowed_between(self, self, place, place)


def allowed_between(query: MaskSpec, key: MaskSpec, query_place: Array, key_place: Array) -> Array | None:
    """[B or 1, 1, 1 or S, T] bool for a stretch of queries and one of keys of the same rows, or None for all.

    Args:
      query, key: the masks of the two stretches.
      query_place [S], key_place [T]: where in the row they lie.
    """
    parts = []
    if key.padding is not None:
        parts.append(key.padding[:, None, None, :])
    if query.segments is not None and key.segments is not None:
        of_query, of_key = query.segments[:, None, :, None], key.segments[:, None, None, :]
        parts.append((of_query == of_key) & (of_key != 0))
    if query.causal:
        parts.append((query_place[:, None] >= key_place)[None, None])
    return functools.reduce(jnp.logical_and, parts) if parts else None
