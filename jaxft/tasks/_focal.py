"""The focal loss (Lin et al. 2017): what is right already counts less. With a gamma of 0 it is the cross-entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxft.tasks.contract import Array

_LEAST = 1e-30
"""What 1 - p is taken to be where p rounds to 1: a power below 1 has no slope at 0."""


def focal(logp: Array, gamma: float) -> Array:
    """(1 - p)^gamma log p of log-probabilities of any shape, float32.

    Its gradient is finite everywhere, where p rounds to 1 too.
    """
    if gamma == 0:
        return logp
    below = jnp.log(-jnp.expm1(jnp.minimum(logp, -_LEAST)))  # log(1 - p)
    return jnp.exp(gamma * below) * logp


def binary_losses(logits: Array, gamma: float) -> tuple[Array, Array]:
    """The losses of yes-or-no logits, float32 of any shape: where yes is right, and where no is."""
    missed, false = jax.nn.softplus(-logits), jax.nn.softplus(logits)  # -log p and -log(1 - p)
    if gamma == 0:
        return missed, false
    return jnp.exp(-gamma * false) * missed, jnp.exp(-gamma * missed) * false
