"""Backend ``xla``: all logits of a device at once, as einsums that XLA compiles.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxft.attention.backends.scores import (
    Call,
    dropped,
    exp_where,
    for_groups,
    grouped,
    highest,
    masked,
    weights_again,
)
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.layers import dot, recomputed_from
from jaxft.layers.promotion import usual_promotion

Array = jax.Array


def dense(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, bias: Array | None, drop: Dropout | None) -> Array:
    """See :func:`jaxft.attention.attend`."""
    heads, n = k.shape[1], q.shape[1]
    if bias is not None and heads != n:
        bias = jnp.broadcast_to(bias, (bias.shape[0], n, *bias.shape[2:]))
        bias = grouped(bias, heads)
    # Bits of threefry are dear: they are kept for the backward pass; others are made again.
    kept = _kept(call, drop, q.shape[2], k) if drop is not None and drop.bits == "threefry" else None
    return _attend(call, q.shape[2], grouped(q, heads), k, v, mask, bias, drop, kept).reshape(q.shape)


def _kept(call: Call, drop: Dropout, queries: int, k: Array) -> Array:
    kept = drop.kept(jnp.arange(queries), 0, k.shape[2])
    kept = call.compute.rules.constrain(kept, "batch", "act_heads", "length", None)
    return grouped(kept, k.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    call: Call,
    length: int,
    q: Array,
    k: Array,
    v: Array,
    mask: MaskSpec,
    bias: Array | None,
    drop: Dropout | None,
    kept: Array | None,
) -> Array:
    """Attention of :func:`grouped` queries; ``length`` is S."""
    return _attend_fwd(call, length, q, k, v, mask, bias, drop, kept)[0]


def _capped(call: Call, q: Array, k: Array) -> Array:
    """float32 [B, K, N/K S, T]."""
    return call.capped(dot("bnsh,bnth->bnst", call.scaled(q), k, call.compute))


_Saved = tuple[
    *tuple[Array, Array, Array, MaskSpec, Array | None, Dropout | None, Array | None],
    *tuple[Array, Array, Array],
]
"""What :func:`_attend` took, its result, the largest logit of each query, and the logarithm of its normaliser."""


def _attend_fwd(
    call: Call,
    length: int,
    q: Array,
    k: Array,
    v: Array,
    mask: MaskSpec,
    bias: Array | None,
    drop: Dropout | None,
    kept: Array | None,
) -> tuple[Array, _Saved]:
    allowed = for_groups(mask.allowed(length, k.shape[2]), q.shape[2] // length)
    bits = _kept(call, drop, length, k) if kept is None and drop is not None else kept
    logits = _capped(call, q, k)
    logits = masked(logits if bias is None else logits + bias, allowed)
    top = highest(logits, bias is not None)
    weights = exp_where(allowed, logits - top)
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)  # a row that may see nothing
    out = dot("bnst,bnth->bnsh", dropped(weights / total, drop, bits), v, call.compute)
    out = out.astype(call.compute.activation_dtype)
    return out, (q, k, v, mask, bias, drop, kept, out, top, jnp.log(total))


def _attend_bwd(call: Call, length: int, saved: _Saved, g: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, bias, drop, kept, out, top, log_total = saved
    (q, k, drop), g = recomputed_from((q, k, drop), g)
    bits = _kept(call, drop, length, k) if kept is None and drop is not None else kept
    compute = call.compute
    allowed = for_groups(mask.allowed(length, k.shape[2]), q.shape[2] // length)
    capped = _capped(call, q, k)
    weights = weights_again(allowed, capped if bias is None else capped + bias, top, log_total)
    dv = dot("bnst,bnsh->bnth", dropped(weights, drop, bits), g, compute)
    dweights = dropped(dot("bnsh,bnth->bnst", g, v, compute), drop, bits)
    # sum_t weights * dweights, without an S x T array
    mean = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1, keepdims=True)
    dlogits = weights * (dweights - mean)
    dbias = None if bias is None else _summed_to(dlogits, bias)
    dlogits = call.before_cap(dlogits, capped)
    dq = call.scaled(dot("bnst,bnth->bnsh", dlogits, k, compute))
    dk = dot("bnst,bnsh->bnth", dlogits, call.scaled(q), compute)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dbias, None, None


_attend.defvjp(usual_promotion(_attend_fwd), usual_promotion(_attend_bwd))


def _summed_to(grad: Array, like: Array) -> Array:
    """The gradient of something that was broadcast."""
    axes = tuple(i for i, (have, want) in enumerate(zip(grad.shape, like.shape, strict=True)) if want == 1 != have)
    return grad.sum(axes, keepdims=True).astype(like.dtype)
