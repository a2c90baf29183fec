"""SpecAugment (Park et al. 2019): spans of frames, and of bins of frequency, that a training step sees as 0.

How many spans there are, and where they begin, has the distribution of the reference's (`_compute_mask_indices` of transformers).

Dims: B batch, P frames, C bins, K spans.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray

Array = jax.Array


class Spans(NamedTuple):
    """What is taken out along one axis."""

    share: float
    """The share of places that spans would cover if none overlapped; 0: nothing is taken out."""
    length: int
    """Places of a span."""
    least: int = 0
    """Spans that there are at least."""


def masked(frames: Float[Array, "B P C"], key: PRNGKeyArray, time: Spans, bins: Spans) -> Float[Array, "B P C"]:
    """Frames with spans over time and over bins of frequency that are 0, drawn for each row by itself."""
    rows, places, count = frames.shape
    for axis, (spans, size) in enumerate(((time, places), (bins, count))):
        if spans.share > 0:
            out = covered(jax.random.fold_in(key, axis), rows, size, spans)
            frames = jnp.where(out[:, :, None] if axis == 0 else out[:, None], 0.0, frames)
    return frames


def covered(key: PRNGKeyArray, rows: int, size: int, spans: Spans) -> Bool[Array, "B P"]:
    """Which of ``size`` places of each row spans cover. They begin at different places, and may overlap."""
    wanted, begins = spans.share * size / spans.length, size - spans.length + 1
    most = min(max(int(wanted) + 1, spans.least), size // spans.length, begins)
    for_count, for_places = jax.random.split(key)
    # As many as wanted on average: the fraction that is left is one more, so often.
    drawn = jnp.floor(wanted + jax.random.uniform(for_count, (rows, 1))).astype(jnp.int32)
    there = jnp.arange(most) < jnp.minimum(jnp.maximum(drawn, spans.least), most)
    first = jax.lax.top_k(jax.random.uniform(for_places, (rows, begins)), most)[1]
    row, change = jnp.arange(rows)[:, None], there.astype(jnp.int32)
    edges = jnp.zeros((rows, size + 1), jnp.int32).at[row, first].add(change)
    edges = edges.at[row, first + spans.length].add(-change)
    return jnp.cumsum(edges, 1)[:, :size] > 0
