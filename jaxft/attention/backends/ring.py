"""Attention on rows whose length is split over devices: keys and values go around a ring (Liu et al. 2023).

Each device keeps its stretch of queries. In as many rounds as there are devices on the mesh's ``context`` axis, it meets
the keys and values of every stretch, sums up with a running softmax (Milakov & Gimelshein 2018), and passes them on. In
the backward pass the gradients of keys and values travel with them, and are home after the last round.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size; s a stretch of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxft.attention.backends.scores import MASKED, Call, dropped, exp_where, for_groups, grouped, masked, weights_again
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec, allowed_between
from jaxft.attention.placed import specs_of
from jaxft.layers import dot, recomputed_from
from jaxft.layers.promotion import usual_promotion
from jaxft.parallel.sharding import CONTEXT

Array = jax.Array
T = TypeVar("T")


_Saved = tuple[Array, Array, Array, MaskSpec, Dropout | None, Array, Array, Array]
"""q, k, v, mask and dropout of a call, its result, the largest logit of each query, and the logarithm of its normaliser."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """See :func:`jaxft.attention.attend`; no bias."""
    return _ring_fwd(call, q, k, v, mask, drop)[0]


def _ring_fwd(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> tuple[Array, _Saved]:
    local = functools.partial(_forward, call)
    results = _on_stretches(call, local, ("q", "top", "log_total"), q=q, k=k, v=v, mask=mask, drop=drop)
    out, top, log_total = results
    return out, (q, k, v, mask, drop, out, top, log_total)


def _ring_bwd(call: Call, saved: _Saved, g: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, drop, out, top, log_total = saved
    # Otherwise compilers find that the forward pass has sent the same round, and keep what every device got.
    (k, v), g = recomputed_from((k, v), g)
    local = functools.partial(_backward, call)
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "mask": mask,
        "drop": drop,
        "out": out,
        "top": top,
        "log_total": log_total,
        "g": g,
    }
    grads = _on_stretches(call, local, ("q", "k", "v"), **arrays)
    return *grads, None, None


ring.defvjp(usual_promotion(_ring_fwd), usual_promotion(_ring_bwd))


def _on_stretches(
    call: Call, local: Callable[..., tuple[Array, ...]], results: tuple[str, ...], **arrays: PyTree[Array]
) -> tuple[Array, ...]:
    """``local(**arrays)`` on each device's part of the arrays."""
    rules = call.compute.rules
    specs = specs_of(rules, arrays["mask"], arrays["drop"])
    number = rules.spec(("batch", "act_heads", "length"))
    specs |= {"out": specs["q"], "g": specs["q"], "top": number, "log_total": number}
    mapped = jax.shard_map(
        lambda arrays: local(**arrays),
        in_specs=({name: specs[name] for name in arrays},),
        out_specs=tuple(specs[name] for name in results),
        check_vma=False,
    )
    return mapped(arrays)


class _Rounds:
    """What is the same in both directions: whose keys a device meets in a round, what its queries may see of them."""

    def __init__(self, q: Array, k: Array, mask: MaskSpec) -> None:
        self.count, self._me = lax.axis_size(CONTEXT), lax.axis_index(CONTEXT)
        self._mask, self._place = mask, jnp.arange(q.shape[2])
        self.groups, self.key_heads = q.shape[1] // k.shape[1], k.shape[1]

    def owner(self, round_: int) -> Array:
        """Where the keys met in a round come from."""
        return (self._me - round_) % self.count

    def allowed(self, round_: int, keys: MaskSpec) -> Array | None:
        """[B or 1, 1, 1 or N/K s, s]."""
        s = self._place.size
        places = (self._me * s + self._place, self.owner(round_) * s + self._place)
        return for_groups(allowed_between(self._mask, keys, *places), self.groups)

    def kept(self, round_: int, drop: Dropout | None) -> Array | None:
        """What dropout leaves of this device's queries and the keys met in a round, grouped."""
        if drop is None:
            return None
        s = self._place.size
        kept = drop.kept(self._me * s + self._place, self.owner(round_) * s, s)
        return grouped(kept, self.key_heads)

    def passed_on(self, tree: T) -> T:
        """Each array at its next device."""
        pairs = [(i, (i + 1) % self.count) for i in range(self.count)]
        return jax.tree.map(lambda x: lax.ppermute(x, CONTEXT, pairs), tree)


def _capped(call: Call, q: Array, k: Array) -> Array:
    """float32 [B, K, N/K s, s]."""
    return call.capped(dot("bnsh,bnth->bnst", call.scaled(q), k, call.compute))


def _forward(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> tuple[Array, ...]:
    """(out [B, N, s, H], largest logit [B, N, s], log of the sum of exp beside it) of one device's queries."""
    compute = call.compute
    rounds, queries = _Rounds(q, k, mask), grouped(q, k.shape[1])
    shape = queries.shape[:3]
    top = jnp.full((*shape, 1), MASKED)
    total, out = jnp.zeros((*shape, 1)), jnp.zeros(queries.shape, jnp.float32)
    met = (k, v, mask)
    for i in range(rounds.count):
        keys, values, key_mask = met
        if i + 1 < rounds.count:
            met = rounds.passed_on(met)  # on its way while this round's products are computed
        allowed = rounds.allowed(i, key_mask)
        logits = masked(_capped(call, queries, keys), allowed)
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights = exp_where(allowed, logits - new_top)
        fade = jnp.exp(top - new_top)
        total = total * fade + weights.sum(-1, keepdims=True)
        seen = dropped(weights, drop, rounds.kept(i, drop))
        out = out * fade + dot("bnst,bnth->bnsh", seen, values, compute)
        top = new_top
    total = jnp.where(total == 0.0, 1.0, total)  # a row that may see nothing
    sums = (x.reshape(q.shape[:3]) for x in (top, jnp.log(total)))
    return (out / total).astype(compute.activation_dtype).reshape(q.shape), *sums


def _backward(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    mask: MaskSpec,
    drop: Dropout | None,
    out: Array,
    top: Array,
    log_total: Array,
    g: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of one device's queries, and of the keys and values that it lent."""
    compute = call.compute
    rounds = _Rounds(q, k, mask)
    queries, g = grouped(q, k.shape[1]), grouped(g, k.shape[1])
    top, log_total = (grouped(x[..., None], k.shape[1]) for x in (top, log_total))
    # sum_t weights * dweights, without an s x T array
    mean = (grouped(out, k.shape[1]).astype(jnp.float32) * g.astype(jnp.float32)).sum(-1, keepdims=True)
    dq = jnp.zeros(queries.shape, jnp.float32)
    met, owed = (k, v, mask), (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    for i in range(rounds.count):
        keys, values, key_mask = met
        if i + 1 < rounds.count:
            met = rounds.passed_on(met)
        allowed = rounds.allowed(i, key_mask)
        capped = _capped(call, queries, keys)
        weights = weights_again(allowed, capped, top, log_total)
        kept = rounds.kept(i, drop)
        dvalues = dot("bnst,bnsh->bnth", dropped(weights, drop, kept), g, compute)
        dweights = dropped(dot("bnsh,bnth->bnst", g, values, compute), drop, kept)
        dlogits = call.before_cap(weights * (dweights - mean), capped)
        dq = dq + call.scaled(dot("bnst,bnth->bnsh", dlogits, keys, compute))
        dkeys = dot("bnst,bnsh->bnth", dlogits, call.scaled(queries), compute)
        owed = rounds.passed_on((owed[0] + dkeys, owed[1] + dvalues))
    return dq.reshape(q.shape).astype(q.dtype), owed[0].astype(k.dtype), owed[1].astype(v.dtype)
