"""Scaled dot-product attention: one entry, :func:`attend`, that takes mask *data*, never a mask array.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import jax

from jaxft.attention.dense import dense
from jaxft.attention.mask import MaskSpec
from jaxft.attention.ring import ring
from jaxft.layers import Compute, keep_mask
from jaxft.sharding import CONTEXT

__all__ = ["MaskSpec", "attend"]

Array = jax.Array


def attend(q: Array, k: Array, v: Array, mask: MaskSpec, compute: Compute, rate: float, key: Array | None) -> Array:
    """softmax(q k^T / sqrt(H)) v with float32 softmax (Vaswani et al. 2017).

    The backward pass computes the probabilities again from ``q``, ``k`` and the log of their normaliser (as Dao et al.
    2022 do), so that a layer keeps nothing of size S x T but the bits of its dropout. Where the mesh splits the length of
    rows, keys and values go around a ring of devices (:mod:`jaxft.attention.ring`).

    Args:
      q: [B, N, S, H]. k, v: [B, K, S, H]; each of the K heads serves N / K neighbouring ones (Ainslie et al. 2023).
      mask: who may see whom; rows that may see nothing give zeros.
      rate, key: dropout of attention probabilities; no key, no dropout.

    Returns: [B, N, S, H].
    """
    b, n, s, _ = q.shape
    if k.shape[2] != s or n % k.shape[1]:
        raise ValueError(f"queries [B, N, S, H] {q.shape} and keys [B, K, S, H] {k.shape}: S must be equal, K divide N")
    kept = scale = None
    if key is not None and rate > 0.0:
        kept, keep_scale = keep_mask(key, rate, (b, n, s, s))
        kept, scale = compute.rules.constrain(kept, "batch", "act_heads", "length", None), float(keep_scale)
    mesh = jax.sharding.get_abstract_mesh()
    how = ring if not mesh.empty and mesh.shape.get(CONTEXT, 1) > 1 else dense
    return how(compute, scale, q, k, v, mask, kept)
