"""Attention on rows that lie whole on a device: all logits of a head at once.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.attention.mask import MaskSpec
from jaxft.layers import Compute, dot, recomputed_from

Array = jax.Array
MASKED = np.float32(-1e30)  # finite: exp underflows to 0, and a fully masked row has no nan


def dense(
    compute: Compute, keep_scale: float | None, q: Array, k: Array, v: Array, mask: MaskSpec, kept: Array | None
) -> Array:
    """See :func:`jaxft.attention.attend`; ``kept`` [B, N, S, T] bool says which probabilities dropout leaves."""
    heads = k.shape[1]
    out = _attend(compute, keep_scale, grouped(q, heads), k, v, mask, None if kept is None else grouped(kept, heads))
    return out.reshape(q.shape)


def grouped(x: Array, key_heads: int) -> Array:
    """[B, N, S, ...] as [B, K, N/K S, ...]: queries that share a key head are so many more queries of that head."""
    return x.reshape(x.shape[0], key_heads, -1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    compute: Compute, keep_scale: float | None, q: Array, k: Array, v: Array, mask: MaskSpec, kept: Array | None
) -> Array:
    return _attend_fwd(compute, keep_scale, q, k, v, mask, kept)[0]


def logits_of(q: Array, k: Array, allowed: Array | None, compute: Compute) -> Array:
    """float32 [B, K, N/K S, T], ``MASKED`` where not allowed."""
    logits = dot("bnsh,bnth->bnst", q * scale_of(q), k, compute)
    return logits if allowed is None else jnp.where(allowed, logits, MASKED)


def _allowed(mask: MaskSpec, q: Array, k: Array) -> Array | None:
    """As :meth:`MaskSpec.allowed`, for queries of several heads one after the other."""
    return for_groups(mask.allowed(k.shape[2]), q.shape[2] // k.shape[2])


def for_groups(allowed: Array | None, groups: int) -> Array | None:
    """What :func:`grouped` queries may see."""
    if allowed is None or allowed.shape[2] == 1:
        return allowed
    return jnp.tile(allowed, (1, 1, groups, 1))


def scale_of(q: Array) -> Array:
    """1 / sqrt(H)."""
    return np.float32(q.shape[-1] ** -0.5).astype(q.dtype)


def dropped(weights: Array, keep_scale: float | None, kept: Array | None) -> Array:
    """Probabilities, or their gradients, after dropout."""
    return weights if kept is None else jnp.where(kept, weights * np.float32(keep_scale), 0.0)


def _attend_fwd(
    compute: Compute, keep_scale: float | None, q: Array, k: Array, v: Array, mask: MaskSpec, kept: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    allowed = _allowed(mask, q, k)
    logits = logits_of(q, k, allowed, compute)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)  # a row that may see nothing
    out = dot("bnst,bnth->bnsh", dropped(weights / total, keep_scale, kept), v, compute).astype(
        compute.activation_dtype
    )
    return out, (q, k, v, mask, kept, out, top + jnp.log(total))


def _attend_bwd(
    compute: Compute, keep_scale: float | None, saved: tuple[Any, ...], g: Array
) -> tuple[Array | None, ...]:
    q, k, v, mask, kept, out, normaliser = saved
    (q, k), g = recomputed_from((q, k), g)
    allowed = _allowed(mask, q, k)
    weights = jnp.exp(logits_of(q, k, allowed, compute) - normaliser)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    dv = dot("bnst,bnsh->bnth", dropped(weights, keep_scale, kept), g, compute)
    dweights = dropped(dot("bnsh,bnth->bnst", g, v, compute), keep_scale, kept)
    # sum_t weights * dweights, without an S x T array
    mean = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1, keepdims=True)
    dlogits = weights * (dweights - mean)
    dq = dot("bnst,bnth->bnsh", dlogits, k, compute) * scale_of(q)
    dk = dot("bnst,bnsh->bnth", dlogits, q * scale_of(q), compute)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
