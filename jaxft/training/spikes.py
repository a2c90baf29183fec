"""Steps whose loss or gradient stands out from those before: seen, counted, and left out.

The rule is that of the skip-step optimizer of OLMo-core (AI2's library for OLMo 2, arXiv 2501.00656): a step is left out if its
loss, or the norm of its gradient, is more than some standard deviations (there 6) above the mean of the last 128 steps. Its details
are kept: the deviation is that of a sample (divided by n - 1), the first step that is judged is the 64th, and what was left out is
counted among the last 128 as well, so that a lasting rise is followed after a few steps. Steps that are not finite are not: they
would make every later step look ordinary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")

WINDOW = 128
"""Steps that a step is compared with."""
_FIRST = WINDOW // 2
"""Number of the first step that is judged, counted from 1."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recent(Generic[T]):
    """What the latest finite steps were like; part of the training state. Of arrays, or of their shapes or shardings."""

    losses: T
    """float32 [128]: mean losses; step i of those that were finite is at i modulo 128."""
    norms: T
    """float32 [128]: norms of gradients, likewise."""
    seen: T
    """int32: finite steps so far."""
    spikes: T
    """int32: how many of them changed nothing because they stood out."""


def no_steps() -> Recent[jax.Array]:
    """What is known before the first step. Traceable."""

    def window() -> jax.Array:
        return jnp.zeros(WINDOW, jnp.float32)

    def count() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return Recent(window(), window(), count(), count())


def stands_out(recent: Recent[jax.Array], loss: jax.Array, norm: jax.Array, deviations: float) -> jax.Array:
    """Whether a step's mean loss or gradient norm is so many standard deviations above the mean of the latest."""
    known = jnp.arange(WINDOW) < recent.seen
    count = jnp.minimum(recent.seen, WINDOW).astype(jnp.float32)

    def is_above(value: jax.Array, window: jax.Array) -> jax.Array:
        mean = window.sum() / jnp.maximum(count, 1)  # places that hold nothing yet hold 0
        squares = jnp.square(jnp.where(known, window - mean, 0.0)).sum()
        # Numbers too large to be squared give a deviation of infinity, above which nothing is.
        return value - mean > deviations * jnp.sqrt(squares / jnp.maximum(count - 1, 1))

    judged = recent.seen + 1 >= _FIRST
    return judged & (is_above(loss, recent.losses) | is_above(norm, recent.norms))


def with_step(
    recent: Recent[jax.Array], loss: jax.Array, norm: jax.Array, finite: jax.Array, spike: jax.Array
) -> Recent[jax.Array]:
    """The same after a step; unchanged by one that is not finite."""
    place = recent.seen % WINDOW

    def put(window: jax.Array, value: jax.Array) -> jax.Array:
        return window.at[place].set(jnp.where(finite, value.astype(jnp.float32), window[place]))

    one = finite.astype(jnp.int32)
    return Recent(
        put(recent.losses, loss), put(recent.norms, norm), recent.seen + one, recent.spikes + spike.astype(jnp.int32)
    )
