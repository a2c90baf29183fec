"""What each token looks at, as numbers to be read: backends never hold them all together.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxft.attention.mask import MaskSpec

Array = jax.Array


def attention_probabilities(
    q: Array,
    k: Array,
    mask: MaskSpec,
    bias: Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Array:
    """[B, N, S, T] float32, the softmax over keys of scaled products, all of them at once; rows of tokens that see nothing are 0.

    Args:
      q: [B, N, S, H].
      k: [B, K, T, H]; consecutive query heads share a key head.
      mask: which key each query may see.
      bias: added to the products, as :func:`jaxft.attention.attend` adds it.
      scale: of the products; None: 1 / sqrt(H).
      soft_cap: of the scaled products l, which become soft_cap tanh(l / soft_cap).
    """
    groups = q.shape[1] // k.shape[1]
    wide = jnp.repeat(k.astype(jnp.float32), groups, axis=1)
    logits = jnp.einsum("bnsh,bnth->bnst", q.astype(jnp.float32), wide, precision="highest")
    logits = logits / math.sqrt(q.shape[-1]) if scale is None else logits * scale
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    logits = logits if bias is None else logits + bias
    allowed = mask.allowed(q.shape[2], k.shape[2])
    if allowed is None:
        return jax.nn.softmax(logits, axis=-1)
    return jax.nn.softmax(logits, axis=-1, where=jnp.broadcast_to(allowed, logits.shape))
