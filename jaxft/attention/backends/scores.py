"""What backends of our own have in common: logits, what dropout and masks do to them, and the way back.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.layers import Compute

Array = jax.Array
MASKED = np.finfo(np.float32).min  # below every logit, and finite: a row that may see nothing makes no nan


@dataclass(frozen=True)
class Call:
    """The static part of a call of :func:`jaxft.attention.attend`."""

    compute: Compute
    scale: float
    """What q k^T is multiplied by; positive."""
    soft_cap: float | None = None
    """Logits l become soft_cap tanh(l / soft_cap) (Gemma 2)."""

    @property
    def exact_scale(self) -> float:
        """The power of two in ``scale``: queries are multiplied by it without rounding, whatever their type."""
        return 2.0 ** math.floor(math.log2(self.scale))

    @property
    def rest_scale(self) -> float:
        """What is left of ``scale`` for float32 logits; 1 for head sizes 16, 64 and 256."""
        return self.scale / self.exact_scale

    def scaled(self, q: Array) -> Array:
        """``q`` times :attr:`exact_scale`."""
        return q * np.float32(self.exact_scale).astype(q.dtype)

    def capped(self, products: Array) -> Array:
        """Logits from products of scaled queries with keys: the rest of the scale, and the soft cap, if any."""
        logits = products if self.rest_scale == 1.0 else products * np.float32(self.rest_scale)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def before_cap(self, dlogits: Array, capped: Array) -> Array:
        """The gradient of products from that of logits."""
        if self.soft_cap is not None:
            dlogits = dlogits * (1.0 - jnp.square(capped / self.soft_cap))
        return dlogits if self.rest_scale == 1.0 else dlogits * np.float32(self.rest_scale)


def grouped(x: Array, key_heads: int) -> Array:
    """[B, N, S, ...] as [B, K, N/K S, ...]: queries that share a key head are so many more queries of that head."""
    return x.reshape(x.shape[0], key_heads, -1, x.shape[-1])


def for_groups(allowed: Array | None, groups: int) -> Array | None:
    """What :func:`grouped` queries may see."""
    if allowed is None or allowed.shape[2] == 1:
        return allowed
    return jnp.tile(allowed, (1, 1, groups, 1))


def exp_where(allowed: Array | None, exponent: Array) -> Array:
    """exp, 0 where not allowed (a row that may see nothing has no finite maximum to be small against)."""
    weights = jnp.exp(exponent)
    return weights if allowed is None else jnp.where(allowed, weights, 0.0)


def highest(logits: Array, biased: bool) -> Array:
    """The largest logit of each row, [..., 1]; ``MASKED`` where a bias is -inf for all that a row may see."""
    top = logits.max(-1, keepdims=True)
    return jnp.maximum(top, MASKED) if biased else top


def weights_again(allowed: Array | None, logits: Array, top: Array, log_total: Array) -> Array:
    """Probabilities of a backward pass, from logits that it computes again and what the forward pass found of their row.

    Args:
      top: the largest logit. log_total: log of the sum of exp(logit - top). Not added up: float32 has no digits for the
        logarithm beside a logit of 1e8, nor beside a bias of the least finite float.
    """
    # Computed again, in another order of sums, a logit may come out above the largest.
    return exp_where(allowed, jnp.minimum(masked(logits, allowed) - top, 0.0) - log_total)


def masked(logits: Array, allowed: Array | None) -> Array:
    """Logits, ``MASKED`` where not allowed."""
    return logits if allowed is None else jnp.where(allowed, logits, MASKED)


def dropped(weights: Array, drop: Dropout | None, kept: Array | None) -> Array:
    """Probabilities, or their gradients, after dropout."""
    return weights if drop is None or kept is None else jnp.where(kept, weights * drop.scale, 0.0)


def nothing_where_blind(out: Array, mask: MaskSpec, keys: int) -> Array:
    """``out`` [B, N, S, H], zeros for queries that may see none of ``keys`` keys, whose gradients it cuts off too."""
    sees = mask.sees_any(out.shape[2], keys)
    return out if sees is None else jnp.where(sees[:, None, :, None], out, jnp.zeros_like(out))
