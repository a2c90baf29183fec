"""Scaled dot-product attention: one entry, :func:`attend`, that takes mask *data*, never a mask array.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.layers import Compute, dot, keep_mask, recomputed_from

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
    causal: bool = field(default=False, metadata={"static": True})
    """A token sees only itself and those before it in the row."""

    def allowed(self, length: int) -> Array | None:
        """[B or 1, 1, 1 or S, T] bool for rows of ``length`` S = T, or None if everything may be seen."""
        parts = []
        if self.padding is not None:
            parts.append(self.padding[:, None, None, :])
        if self.segments is not None:
            query, key = self.segments[:, None, :, None], self.segments[:, None, None, :]
            parts.append((query == key) & (key != 0))
        if self.causal:
            place = jnp.arange(length)
            parts.append((place[:, None] >= place)[None, None])
        return functools.reduce(jnp.logical_and, parts) if parts else None


def attend(q: Array, k: Array, v: Array, mask: MaskSpec, compute: Compute, rate: float, key: Array | None) -> Array:
    """softmax(q k^T / sqrt(H)) v with float32 softmax (Vaswani et al. 2017).

    The backward pass computes the probabilities again from ``q``, ``k`` and the log of their normaliser (as Dao et al.
    2022 do), so that a layer keeps nothing of size S x T but the bits of its dropout.

    Args:
      q: [B, N, S, H]. k, v: [B, K, S, H]; each of the K heads serves N / K neighbouring ones (Ainslie et al. 2023).
      mask: who may see whom; rows that may see nothing give zeros.
      rate, key: dropout of attention probabilities; no key, no dropout.

    Returns: [B, N, S, H].
    """
    b, n, s, h = q.shape
    if k.shape[2] != s or n % k.shape[1]:
        raise ValueError(f"queries [B, N, S, H] {q.shape} and keys [B, K, S, H] {k.shape}: S must be equal, K divide N")
    kept = scale = None
    if key is not None and rate > 0.0:
        kept, keep_scale = keep_mask(key, rate, (b, n, s, s))
        kept, scale = kept.reshape(b, k.shape[1], -1, s), float(keep_scale)
    # Queries that share a key head are so many more queries of that head.
    out = _attend(compute, scale, q.reshape(b, k.shape[1], -1, h), k, v, mask, kept)
    return out.reshape(b, n, s, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    compute: Compute, keep_scale: float | None, q: Array, k: Array, v: Array, mask: MaskSpec, kept: Array | None
) -> Array:
    return _attend_fwd(compute, keep_scale, q, k, v, mask, kept)[0]


def _logits(q: Array, k: Array, allowed: Array | None, compute: Compute) -> Array:
    """float32 [B, K, N/K S, T], ``_MASKED`` where not allowed."""
    logits = dot("bnsh,bnth->bnst", q * _scale(q), k, compute)
    return logits if allowed is None else jnp.where(allowed, logits, _MASKED)


def _allowed(mask: MaskSpec, q: Array, k: Array) -> Array | None:
    """As :meth:`MaskSpec.allowed`, for queries of several heads one after the other."""
    allowed = mask.allowed(k.shape[2])
    if allowed is None or allowed.shape[2] == 1:
        return allowed
    return jnp.tile(allowed, (1, 1, q.shape[2] // k.shape[2], 1))


def _scale(q: Array) -> Array:
    return np.float32(q.shape[-1] ** -0.5).astype(q.dtype)


def _dropped(weights: Array, keep_scale: float | None, kept: Array | None) -> Array:
    return weights if kept is None else jnp.where(kept, weights * np.float32(keep_scale), 0.0)


def _attend_fwd(
    compute: Compute, keep_scale: float | None, q: Array, k: Array, v: Array, mask: MaskSpec, kept: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    allowed = _allowed(mask, q, k)
    logits = _logits(q, k, allowed, compute)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)  # a row that may see nothing
    out = dot("bnst,bnth->bnsh", _dropped(weights / total, keep_scale, kept), v, compute).astype(
        compute.activation_dtype
    )
    return out, (q, k, v, mask, kept, out, top + jnp.log(total))


def _attend_bwd(
    compute: Compute, keep_scale: float | None, saved: tuple[Any, ...], g: Array
) -> tuple[Array | None, ...]:
    q, k, v, mask, kept, out, normaliser = saved
    (q, k), g = recomputed_from((q, k), g)
    allowed = _allowed(mask, q, k)
    weights = jnp.exp(_logits(q, k, allowed, compute) - normaliser)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    dv = dot("bnst,bnsh->bnth", _dropped(weights, keep_scale, kept), g, compute)
    dweights = _dropped(dot("bnsh,bnth->bnst", g, v, compute), keep_scale, kept)
    # sum_t weights * dweights, without an S x T array
    mean = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1, keepdims=True)
    dlogits = weights * (dweights - mean)
    dq = dot("bnst,bnth->bnsh", dlogits, k, compute) * _scale(q)
    dk = dot("bnst,bnsh->bnth", dlogits, q * _scale(q), compute)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
