"""Scaled dot-product attention: one entry, :func:`attend`, that takes mask *data*, never a mask array.

Dims: B batch, S query length, T key length, N heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.layers import Compute, dropout, einsum

Array = jax.Array
_MASKED = np.float32(-1e30)  # finite: exp underflows to 0, and a fully masked row has no nan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskSpec:
    """Which key each query may see. A backend that cannot honour a part of it must refuse, not ignore it."""

    padding: Array | None = None
    """[B, T] bool, False where a key is padding. Padding queries see the same keys as others; their result is unused."""
    segments: Array | None = None
    """[B, S] int32, for packed rows: a token sees only its own segment; 0 is padding and sees nothing."""

    def allowed(self) -> Array | None:
        """[B, 1, 1 or S, T] bool, or None if everything may be seen."""
        allowed = None
        if self.padding is not None:
            allowed = self.padding[:, None, None, :]
        if self.segments is not None:
            query, key = self.segments[:, None, :, None], self.segments[:, None, None, :]
            same = (query == key) & (key != 0)
            allowed = same if allowed is None else allowed & same
        return allowed


def attend(q: Array, k: Array, v: Array, mask: MaskSpec, compute: Compute, rate: float, key: Array | None) -> Array:
    """softmax(q k^T / sqrt(H)) v with float32 softmax (Vaswani et al. 2017).

    Args:
      q: [B, N, S, H]. k, v: [B, N, T, H].
      mask: who may see whom; rows that may see nothing give zeros.
      rate, key: dropout of attention probabilities; no key, no dropout.

    Returns: [B, N, S, H].
    """
    scale = np.float32(q.shape[-1] ** -0.5)
    logits = einsum("bnsh,bnth->bnst", q * scale.astype(q.dtype), k, compute).astype(jnp.float32)
    allowed = mask.allowed()
    if allowed is not None:
        logits = jnp.where(allowed, logits, _MASKED)
    weights = jax.nn.softmax(logits, axis=-1)
    if allowed is not None:
        weights = weights * allowed.any(-1, keepdims=True)
    weights = dropout(weights, rate, key)
    return einsum("bnst,bnth->bnsh", weights, v, compute)
