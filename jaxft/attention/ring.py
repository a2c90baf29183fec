"""Attention on rows whose length is split over devices: keys and values go around a ring (Liu et al. 2023).

Each device keeps its stretch of queries. In as many rounds as there are devices on the mesh's ``context`` axis, it meets
the keys and values of every stretch, sums up with a running softmax (Milakov & Gimelshein 2018), and passes them on. In
the backward pass the gradients of keys and values travel with them, and are home after the last round.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size; s a stretch of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.attention.dense import MASKED, dropped, for_groups, grouped, logits_of, scale_of
from jaxft.attention.mask import MaskSpec, allowed_between
from jaxft.errors import UserError
from jaxft.layers import Compute, dot, recomputed_from
from jaxft.sharding import CONTEXT

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring(
    compute: Compute, keep_scale: float | None, q: Array, k: Array, v: Array, mask: MaskSpec, kept: Array | None
) -> Array:
    """See :func:`jaxft.attention.attend`; ``kept`` [B, N, S, T] bool says which probabilities dropout leaves.

    Raises:
      UserError: query and key heads are not split alike.
    """
    return _ring_fwd(compute, keep_scale, q, k, v, mask, kept)[0]


def _ring_fwd(
    compute: Compute, keep_scale: float | None, q: Array, k: Array, v: Array, mask: MaskSpec, kept: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    local = functools.partial(_forward, compute, keep_scale)
    out, normaliser = _on_stretches(compute, local, ("q", "q_number"), q=q, k=k, v=v, mask=mask, kept=kept)
    return out, (q, k, v, mask, kept, out, normaliser)


def _ring_bwd(compute: Compute, keep_scale: float | None, saved: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, kept, out, normaliser = saved
    # Otherwise compilers find that the forward pass has sent the same round, and keep what every device got.
    (k, v), g = recomputed_from((k, v), g)
    local = functools.partial(_backward, compute, keep_scale)
    grads = _on_stretches(
        compute, local, ("q", "k", "v"), q=q, k=k, v=v, mask=mask, kept=kept, out=out, q_number=normaliser, g=g
    )
    return *grads, None, None


ring.defvjp(_ring_fwd, _ring_bwd)


def _on_stretches(compute: Compute, local: Callable[..., Any], results: tuple[str, ...], **arrays: Any) -> Any:
    """``local(**arrays)`` on each device's part of the arrays."""
    rules = compute.rules
    row = rules.spec(("batch", "length"))
    query = rules.spec(("batch", "act_heads", "length", None))
    key = rules.spec(("batch", "act_kv_heads", "length", None))
    if query[1] != key[1]:
        raise UserError(
            f"mesh.context: query heads are split over {query[1]}, key heads over {key[1]}; the ring needs both split alike"
        )
    mask: MaskSpec = arrays["mask"]
    specs = {
        "q": query, "k": key, "v": key, "kept": query, "out": query, "g": query,
        "q_number": rules.spec(("batch", "act_heads", "length")),
        "mask": jax.tree.map(lambda _: row, mask),
    }  # fmt: skip
    given = {name: value for name, value in arrays.items() if value is not None}
    mapped = jax.shard_map(
        lambda given: local(**{"kept": None, **given}),
        in_specs=({name: specs[name] for name in given},),
        out_specs=tuple(specs[name] for name in results),
        check_vma=False,
    )
    return mapped(given)


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

    def kept(self, round_: int, kept: Array | None) -> Array | None:
        """The columns of ``kept`` [B, N, s, T] that belong to the keys met in a round, grouped."""
        if kept is None:
            return None
        s = self._place.size
        return grouped(lax.dynamic_slice_in_dim(kept, self.owner(round_) * s, s, 3), self.key_heads)

    def passed_on(self, tree: Any) -> Any:
        """Each array at its next device."""
        pairs = [(i, (i + 1) % self.count) for i in range(self.count)]
        return jax.tree.map(lambda x: lax.ppermute(x, CONTEXT, pairs), tree)


def _forward(
    compute: Compute, keep_scale: float | None, q: Array, k: Array, v: Array, mask: MaskSpec, kept: Array | None
) -> tuple[Array, Array]:
    """(out [B, N, s, H], log of the normaliser [B, N, s]) of one device's queries."""
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
        logits = logits_of(queries, keys, allowed, compute)
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - new_top)
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0.0)
        fade = jnp.exp(top - new_top)
        total = total * fade + weights.sum(-1, keepdims=True)
        seen = dropped(weights, keep_scale, rounds.kept(i, kept))
        out = out * fade + dot("bnst,bnth->bnsh", seen, values, compute)
        top = new_top
    total = jnp.where(total == 0.0, 1.0, total)  # a row that may see nothing
    normaliser = (top + jnp.log(total)).reshape(q.shape[:3])
    return (out / total).astype(compute.activation_dtype).reshape(q.shape), normaliser


def _backward(
    compute: Compute,
    keep_scale: float | None,
    q: Array,
    k: Array,
    v: Array,
    mask: MaskSpec,
    kept: Array | None,
    out: Array,
    q_number: Array,
    g: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of one device's queries, and of the keys and values that it lent."""
    rounds = _Rounds(q, k, mask)
    queries, g = grouped(q, k.shape[1]), grouped(g, k.shape[1])
    normaliser = grouped(q_number[..., None], k.shape[1])
    # sum_t weights * dweights, without an s x T array
    mean = (grouped(out, k.shape[1]).astype(jnp.float32) * g.astype(jnp.float32)).sum(-1, keepdims=True)
    dq = jnp.zeros(queries.shape, jnp.float32)
    met, owed = (k, v, mask), (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    for i in range(rounds.count):
        keys, values, key_mask = met
        if i + 1 < rounds.count:
            met = rounds.passed_on(met)
        allowed = rounds.allowed(i, key_mask)
        weights = jnp.exp(logits_of(queries, keys, allowed, compute) - normaliser)
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0.0)
        kept_here = rounds.kept(i, kept)
        dvalues = dot("bnst,bnsh->bnth", dropped(weights, keep_scale, kept_here), g, compute)
        dweights = dropped(dot("bnsh,bnth->bnst", g, values, compute), keep_scale, kept_here)
        dlogits = weights * (dweights - mean)
        dq = dq + dot("bnst,bnth->bnsh", dlogits, keys, compute) * scale_of(q)
        dkeys = dot("bnst,bnsh->bnth", dlogits, queries * scale_of(q), compute)
        owed = rounds.passed_on((owed[0] + dkeys, owed[1] + dvalues))
    return dq.reshape(q.shape).astype(q.dtype), owed[0].astype(k.dtype), owed[1].astype(v.dtype)
