"""Which key each query may see: mask *data*, never a mask array.

Dims: B batch, S query length, T key length.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Integer, PyTree

Array = jax.Array


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class MaskSpec:
    """Which key each query may see. A backend that cannot honour a part of it must refuse, not ignore it."""

    padding: Bool[Array, "B T"] | None = None
    """False where a key is padding. Padding queries see the same keys as others; their result is unused."""
    segments: Integer[Array, "B S"] | None = None
    """For packed rows: a token sees only its own segment; 0 is padding and sees nothing."""
    causal: bool = False
    """A token sees only itself and those before it in the row. Static."""
    window: int | None = None
    """A token sees only those fewer than so many places away: with ``causal``, itself and ``window`` - 1 before it (as
    Mistral's ``sliding_window``), else ``window`` - 1 on either side. None: any distance. Static."""
    key_segments: Integer[Array, "B T"] | None = None
    """The segments of keys where these are other tokens than the queries; None: ``segments``."""
    first: Integer[Array, "*B"] | int = 0
    """Where among the keys the first query stands: query i is at place ``first`` + i, which is what ``causal`` and ``window``
    go by. An int is static, and lets backends skip what it hides; an array is [] or [B] int32."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1, for a token sees itself")

    def tree_flatten_with_keys(
        self,
    ) -> tuple[tuple[tuple[jax.tree_util.GetAttrKey, PyTree], ...], tuple[bool, int | None, int | None]]:
        """For jax: arrays are leaves, the rest is static."""
        static = self.first if isinstance(self.first, int) else None
        arrays = {
            "padding": self.padding,
            "segments": self.segments,
            "key_segments": self.key_segments,
            "first": self.first if static is None else None,
        }
        leaves = tuple((jax.tree_util.GetAttrKey(name), leaf) for name, leaf in arrays.items())
        return leaves, (self.causal, self.window, static)

    @classmethod
    def tree_unflatten(cls, static: tuple[bool, int | None, int | None], leaves: tuple[PyTree, ...]) -> MaskSpec:
        """For jax: the inverse of :meth:`tree_flatten_with_keys`."""
        causal, window, first = static
        padding, segments, key_segments, places = leaves
        return cls(padding, segments, causal, window, key_segments, places if first is None else first)

    @property
    def of_keys(self) -> Integer[Array, "B T"] | None:
        """The segments of keys."""
        return self.segments if self.key_segments is None else self.key_segments

    @property
    def shifted(self) -> bool:
        """Whether queries do not stand at the first keys."""
        return not isinstance(self.first, int) or self.first != 0

    def fitted(self, rows: int, queries: int, keys: int) -> MaskSpec:
        """With ``first`` an int or [B], after a look at all shapes.

        Raises:
          ValueError: an array that is not of so many rows, queries and keys; segments of one side only.
        """
        shapes = {"padding": (rows, keys), "segments": (rows, queries), "key_segments": (rows, keys)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"mask: {name} {array.shape}: must be {shape}")
        if self.key_segments is not None and self.segments is None:
            raise ValueError("mask: key_segments without segments: both say which rows belong together")
        if self.segments is not None and self.key_segments is None and keys != queries:
            raise ValueError(f"mask: segments of {queries} queries say nothing of {keys} keys: give key_segments too")
        if isinstance(self.first, int):
            return self
        if self.first.shape not in ((), (rows,)):
            raise ValueError(f"mask: first {self.first.shape}: must be an int, [] or [{rows}]")
        return dataclasses.replace(self, first=jnp.broadcast_to(self.first, (rows,)).astype(jnp.int32))

    def merged(self) -> MaskSpec:
        """With both padding and segments: segments alone, 0 where a key is padding."""
        if self.padding is None or self.of_keys is None:
            return self
        of_keys = jnp.where(self.padding, self.of_keys, 0)
        if self.key_segments is None:
            return dataclasses.replace(self, segments=of_keys, padding=None)
        return dataclasses.replace(self, key_segments=of_keys, padding=None)

    def places(self, queries: Integer[Array, " S"]) -> Integer[Array, "*B S"]:
        """Where among the keys some queries stand, by their numbers."""
        if isinstance(self.first, int):
            return queries + self.first if self.first else queries
        return self.first[..., None] + queries if self.first.ndim else self.first + queries

    def allowed(self, queries: int, keys: int | None = None) -> Bool[Array, "#B 1 #S T"] | None:
        """Who sees whom, or None if everything may be seen.

        Args:
          queries: how many there are in a row, S.
          keys: how many keys there are, T; None: as many.
        """
        mask = self.merged()
        place = jnp.arange(queries)
        key_place = place if keys is None or keys == queries else jnp.arange(keys)
        return allowed_between(mask, mask, mask.places(place), key_place)

    def sees_any(self, queries: int, keys: int | None = None) -> Bool[Array, "#B S"] | None:
        """Whether a query may see any key; None: every one does. Work linear in the lengths, unless the segments
        of keys are others.

        Args:
          queries, keys: as of :meth:`allowed`.
        """
        keys = queries if keys is None else keys
        mask = self.merged()
        if mask.key_segments is not None or (mask.segments is not None and mask.shifted):
            allowed = mask.allowed(queries, keys)
            assert allowed is not None  # there are segments
            return allowed.any(-1)[:, 0]
        if mask.segments is not None:
            return mask.segments != 0  # at least itself
        if mask.padding is None and keys == queries and not mask.shifted:
            return None
        place = mask.places(jnp.arange(queries))
        first = jnp.zeros_like(place) if mask.window is None else jnp.clip(place - mask.window + 1, 0, keys)
        after = keys if mask.window is None else place + mask.window
        end = jnp.broadcast_to(jnp.clip(place + 1 if mask.causal else after, 0, keys), place.shape)
        if mask.padding is None:
            return (end > first).reshape(-1, queries)
        before = jnp.pad(jnp.cumsum(mask.padding, -1, dtype=jnp.int32), ((0, 0), (1, 0)))
        if place.ndim == 1:
            return before[:, end] > before[:, first]
        return jnp.take_along_axis(before, end, 1) > jnp.take_along_axis(before, first, 1)


def allowed_between(query: MaskSpec, key: MaskSpec, query_place: Array, key_place: Array) -> Array | None:
    """[B or 1, 1, 1 or S, T] bool for a stretch of queries and one of keys of the same rows, or None for all.

    Args:
      query, key: the merged masks of the two stretches.
      query_place [S] or [B, S], key_place [T]: where among the keys they lie.
    """
    parts = []
    if key.padding is not None:
        parts.append(key.padding[:, None, None, :])
    if query.segments is not None and key.of_keys is not None:
        of_query, of_key = query.segments[:, None, :, None], key.of_keys[:, None, None, :]
        parts.append((of_query == of_key) & (of_key != 0))

    def by_row(near: Array) -> Array:
        return near[:, None] if near.ndim == 3 else near[None, None]

    if query.causal:
        parts.append(by_row(query_place[..., None] >= key_place))
    if query.window is not None:
        parts.append(by_row(jnp.abs(query_place[..., None] - key_place) < query.window))
    return functools.reduce(jnp.logical_and, parts) if parts else None


def stretch_of_queries(mask: MaskSpec, first: Array | int, count: int) -> MaskSpec:
    """What a merged mask says of ``count`` queries from number ``first`` on, but where they stand."""
    return MaskSpec(None, _stretch(mask.segments, first, count), mask.causal, mask.window)


def stretch_of_keys(mask: MaskSpec, first: Array | int, count: int) -> MaskSpec:
    """What a merged mask says of ``count`` keys from number ``first`` on."""
    return MaskSpec(
        _stretch(mask.padding, first, count), _stretch(mask.of_keys, first, count), mask.causal, mask.window
    )


def _stretch(x: Array | None, first: Array | int, count: int) -> Array | None:
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, first, count, 1)
