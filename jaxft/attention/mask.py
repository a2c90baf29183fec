"""Which key each query may see: mask *data*, never a mask array.

Dims: B batch, S query length, T key length.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Integer

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskSpec:
    """Which key each query may see. A backend that cannot honour a part of it must refuse, not ignore it."""

    padding: Bool[Array, "B T"] | None = None
    """False where a key is padding. Padding queries see the same keys as others; their result is unused."""
    segments: Integer[Array, "B S"] | None = None
    """For packed rows: a token sees only its own segment; 0 is padding and sees nothing."""
    causal: bool = field(default=False, metadata={"static": True})
    """A token sees only itself and those before it in the row."""
    window: int | None = field(default=None, metadata={"static": True})
    """A token sees only those fewer than so many places away: with ``causal``, itself and ``window`` - 1 before it (as
    Mistral's ``sliding_window``), else ``window`` - 1 on either side. None: any distance."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1, for a token sees itself")

    def merged(self) -> MaskSpec:
        """With both padding and segments: segments alone, 0 where a key is padding."""
        if self.padding is None or self.segments is None:
            return self
        return dataclasses.replace(self, segments=jnp.where(self.padding, self.segments, 0), padding=None)

    def allowed(self, length: int) -> Bool[Array, "#B 1 #S T"] | None:
        """Who sees whom, for rows of ``length`` S = T, or None if everything may be seen."""
        place = jnp.arange(length)
        mask = self.merged()
        return allowed_between(mask, mask, place, place)

    def sees_any(self, length: int) -> Bool[Array, "B S"] | None:
        """Whether a token of a row of ``length`` may see any; None: all do. Work linear in ``length``."""
        mask = self.merged()
        if mask.segments is not None:
            return mask.segments != 0  # at least itself
        if mask.padding is None:
            return None
        place = jnp.arange(length)
        window = length if self.window is None else self.window
        first = jnp.maximum(place - window + 1, 0)
        end = jnp.minimum(place + (1 if self.causal else window), length)
        before = jnp.pad(jnp.cumsum(mask.padding, -1, dtype=jnp.int32), ((0, 0), (1, 0)))
        return before[:, end] > before[:, first]


def allowed_between(query: MaskSpec, key: MaskSpec, query_place: Array, key_place: Array) -> Array | None:
    """[B or 1, 1, 1 or S, T] bool for a stretch of queries and one of keys of the same rows, or None for all.

    Args:
      query, key: the merged masks of the two stretches.
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
    if query.window is not None:
        parts.append((jnp.abs(query_place[:, None] - key_place) < query.window)[None, None])
    return functools.reduce(jnp.logical_and, parts) if parts else None
