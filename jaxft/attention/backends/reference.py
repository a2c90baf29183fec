"""Backend ``reference``: the formula of Vaswani et al. 2017, in float32, left to autodiff. What the others are tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxft.attention.backends.scores import Call, dropped
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec

Array = jax.Array


def reference(
    call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, bias: Array | None, drop: Dropout | None
) -> Array:
    """See :func:`jaxft.attention.attend`."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    logits = call.capped(jnp.einsum("bnsh,bnth->bnst", q, k, precision="highest") * call.exact_scale)
    logits = logits if bias is None else logits + bias
    allowed = mask.allowed(q.shape[2], k.shape[2])
    if bias is not None:
        seen = logits != -jnp.inf
        allowed = seen if allowed is None else allowed & seen
    if allowed is not None:
        some = allowed.any(-1, keepdims=True)
        # A softmax of nothing has no gradient: rows that may see nothing pretend to see all alike, and are zeroed.
        weights = jax.nn.softmax(jnp.where(some, jnp.where(allowed, logits, -jnp.inf), 0.0), axis=-1) * (allowed & some)
    else:
        weights = jax.nn.softmax(logits, axis=-1)
    kept = None if drop is None else drop.kept(jnp.arange(q.shape[2]), 0, k.shape[2])
    out = jnp.einsum("bnst,bnth->bnsh", dropped(weights, drop, kept), v, precision="highest")
    return out.astype(call.compute.activation_dtype)
