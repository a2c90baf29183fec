"""Exponential moving average of the parameters (Polyak and Juditsky 1992), for evaluation and export."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

T = TypeVar("T")
"""Trees of one kind."""


def init_ema(params: T) -> T:
    """The average before the first update: a copy of the parameters, in float32.

    In bfloat16, a change by a share of 1 - decay would be rounded away.
    """
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)


def update_ema(average: T, params: T, decay: ArrayLike, count: ArrayLike) -> T:
    """The average after the parameters' update number ``count`` (from 0).

    The first updates use the smaller decay (1 + count) / (10 + count), so that a short run does not end on an average
    that is still mostly the starting point (TensorFlow's ExponentialMovingAverage with ``num_updates``).
    """
    count = jnp.asarray(count, jnp.float32)
    share = 1.0 - jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, p: a + share * (p.astype(jnp.float32) - a), average, params)
