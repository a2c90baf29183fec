"""Backend ``blockwise``: a few heads at a time, and in long rows a block of queries at a time (Rabe & Staats 2021).

Memory grows with the length, not its square. A block of queries meets all keys that it may see by distance and direction
at once, so no running softmax is needed; the backward pass goes over blocks of keys in the same way, with logits transposed:
then two of the three gradients are plain row-major products, and the third one is made transposed, which is the order
that XLA's CPU backend multiplies fast. Causal and windowed attention skip what no query of a block may see.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, G = N/K, H head size; C chunks of heads, R rows
and J key heads of a chunk, s and t stretches of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxft.attention.backends.scores import Call, dropped, exp_where, masked, weights_again
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec, allowed_between, stretch_of_keys, stretch_of_queries
from jaxft.layers import dot, recomputed_from
from jaxft.layers.promotion import usual_promotion

Array = jax.Array
T = TypeVar("T")

# Logits of a chunk: on a CPU about what its caches hold, elsewhere enough to keep every unit busy.
_LOGITS = {"cpu": 2**20}
_LOGITS_ELSEWHERE = 2**26
_BLOCK = 1024  # tokens of a block, at most
_BANDS = 8  # stretches of a row for each of which the program is written out, where a mask lets it skip something


def blockwise(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """See :func:`jaxft.attention.attend`; no bias."""
    length, keys = q.shape[2], k.shape[2]
    blocks = _Blocks(*(_block(count) for count in (length, keys)))
    more, more_keys = (-count % block for count, block in zip((length, keys), blocks, strict=True))
    if more or more_keys:  # rows that no block divides: more keys, that none may see
        q = _longer(q, 2, more)
        k, v = (_longer(x, 2, more_keys) for x in (k, v))
        mask = _padded(mask, q.shape[0], keys, more, more_keys)
    return _blockwise(call, blocks, q, k, v, mask, drop)[:, :, :length]


class _Blocks(NamedTuple):
    """How many tokens a block has."""

    queries: int
    keys: int


def _block(length: int) -> int:
    blocks = -(-length // _BLOCK)
    return length if blocks == 1 else -(-length // (8 * blocks)) * 8


def _longer(x: Array, axis: int, more: int) -> Array:
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x


def _padded(mask: MaskSpec, rows: int, keys: int, more: int, more_keys: int) -> MaskSpec:
    """The mask of ``more`` further queries, and ``more_keys`` keys beyond ``keys``, which none may see."""
    if mask.segments is not None:
        of_keys = None if mask.key_segments is None else _longer(mask.key_segments, 1, more_keys)
        return dataclasses.replace(mask, segments=_longer(mask.segments, 1, more), key_segments=of_keys)
    if not more_keys:
        return mask
    padding = jnp.ones((rows, keys), bool) if mask.padding is None else mask.padding
    return dataclasses.replace(mask, padding=_longer(padding, 1, more_keys))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(
    call: Call, blocks: _Blocks, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None
) -> Array:
    return _forward(call, blocks, q, k, v, mask, drop)[0]


@dataclass(frozen=True)
class _Chunks:
    """How [B, K] heads are cut into chunks: R whole rows, or a part J of one row's key heads."""

    rows: int
    heads: int
    shape: tuple[int, int]
    """B, K."""

    def cut(self, x: Array) -> Array:
        """[B, N or K, S, ...] as [C, R, J, G or 1, S, ...]."""
        b, k = self.shape
        return x.reshape(b // self.rows * (k // self.heads), self.rows, self.heads, x.shape[1] // k, *x.shape[2:])

    def cut_rows(self, tree: T) -> T:
        """Arrays [B, ...] as [C, R, ...]."""
        b, k = self.shape
        return jax.tree.map(
            lambda x: jnp.repeat(x.reshape(b // self.rows, self.rows, *x.shape[1:]), k // self.heads, axis=0), tree
        )

    def cut_drop(self, drop: Dropout | None) -> Array | None:
        """The rows of a dropout, [C, R, J, G]."""
        return None if drop is None else self.cut(drop.rows)

    def joined(self, x: Array) -> Array:
        """Back from :meth:`cut`."""
        b, k = self.shape
        return x.reshape(b, k * x.shape[3], *x.shape[4:])


def _chunks(call: Call, q: Array, k: Array, blocks: _Blocks) -> _Chunks:
    b, n, s, _ = q.shape
    _, kv, t, _ = k.shape
    of_head = n // kv * max(blocks.queries * t, blocks.keys * s)
    budget = max(1, _LOGITS.get(call.compute.platform or jax.default_backend(), _LOGITS_ELSEWHERE) // of_head)
    heads = max(d for d in range(1, kv + 1) if kv % d == 0 and d <= budget)
    rows = max(d for d in range(1, b + 1) if b % d == 0 and d * kv <= max(budget, kv)) if heads == kv else 1
    return _Chunks(rows, heads, (b, kv))


@dataclass(frozen=True)
class _Band:
    """A stretch of blocks of queries, and the stretch of keys that some of them may see; or one of keys, and of queries."""

    first: int
    end: int
    other_first: int
    other_end: int


def _bands(mask: MaskSpec, length: int, others: int, block: int, *, of_keys: bool) -> Iterator[_Band]:
    """Bands of ``length`` queries that see ``others`` keys, or of keys that so many queries see."""
    if (not mask.causal and mask.window is None) or not isinstance(mask.first, int):
        yield _Band(0, length, 0, others)
        return
    count = length // block
    per = -(-count // _BANDS) * block
    window = length + others + abs(mask.first) if mask.window is None else mask.window
    before, after, shift = window - 1, 0 if mask.causal else window - 1, mask.first
    if of_keys:
        before, after, shift = after, before, -shift
    for first in range(0, length, per):
        end = min(first + per, length)
        other_first = min(max(first + shift - before, 0), others - 1)  # one at least, if only to be hidden
        yield _Band(first, end, other_first, max(min(end + shift + after, others), other_first + 1))


_Saved = tuple[Array, Array, Array, MaskSpec, Dropout | None, Array, Array, Array]
"""q, k, v, mask and dropout of a call, its result, the largest logit of each query, and the logarithm of its normaliser."""


def _forward(
    call: Call, blocks: _Blocks, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None
) -> tuple[Array, _Saved]:
    chunks = _chunks(call, q, k, blocks)
    parts = (chunks.cut(q), chunks.cut(k), chunks.cut(v), chunks.cut_rows(mask), chunks.cut_drop(drop))
    results = lax.map(lambda x: _forward_chunk(call, blocks.queries, drop, *x), parts)
    out, top, log_total = (chunks.joined(x) for x in results)
    return out, (q, k, v, mask, drop, out, top, log_total)


def _forward_chunk(
    call: Call, block: int, drop: Dropout | None, q: Array, k: Array, v: Array, mask: MaskSpec, rows: Array | None
) -> tuple[Array, ...]:
    """(out [R, J, G, S, H], largest logit [R, J, G, S], log of the sum of exp beside it) of a chunk."""
    drop = _of_rows(drop, rows)
    k, v = k[:, :, 0], v[:, :, 0]
    outs = []
    for band in _bands(mask, q.shape[3], k.shape[2], block, of_keys=False):
        seen = slice(band.other_first, band.other_end)
        keys, values, key_mask = k[:, :, seen], v[:, :, seen], stretch_of_keys(mask, seen.start, seen.stop - seen.start)

        def queries(first: Array | int, keys=keys, values=values, key_mask=key_mask, seen=seen) -> tuple[Array, ...]:
            return _forward_block(call, drop, q, mask, first, block, keys, values, key_mask, seen.start)

        outs.append(_over_blocks(queries, band, block, axis=3))
    return tuple(_bands_joined(list(parts), 3) for parts in zip(*outs, strict=True))


def _forward_block(
    call: Call,
    drop: Dropout | None,
    q: Array,
    mask: MaskSpec,
    first: Array | int,
    block: int,
    keys: Array,
    values: Array,
    key_mask: MaskSpec,
    first_key: int,
) -> tuple[Array, ...]:
    count = keys.shape[2]
    place, key_place = first + jnp.arange(block), first_key + jnp.arange(count)
    allowed = allowed_between(stretch_of_queries(mask, first, block), key_mask, mask.places(place), key_place)
    allowed = None if allowed is None else allowed[:, :, None]
    here = lax.dynamic_slice_in_dim(q, first, block, 3)
    r, j, g, s, h = here.shape
    flat = (r, j, g * s)
    logits = call.capped(dot("rjsh,rjth->rjst", call.scaled(here).reshape(*flat, h), keys, call.compute))
    logits = masked(logits.reshape(r, j, g, s, count), allowed)
    top = logits.max(-1, keepdims=True)
    weights = exp_where(allowed, logits - top)
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)  # a row that may see nothing
    kept = None if drop is None else drop.kept(place, first_key, count)
    out = dot("rjst,rjth->rjsh", dropped(weights, drop, kept).reshape(*flat, count), values, call.compute)
    out = (out.reshape(here.shape) / total).astype(call.compute.activation_dtype)
    return out, top[..., 0], jnp.log(total)[..., 0]


def _backward(call: Call, blocks: _Blocks, saved: _Saved, g: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, drop, out, top, log_total = saved
    (q, k), g = recomputed_from((q, k), g)
    top = _reachable(call, top, q, k)
    # sum_t weights * dweights, without an S x T array
    mean = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1)
    chunks = _chunks(call, q, k, blocks)
    parts = (
        *(chunks.cut(x) for x in (q, k, v, g, top, log_total, mean)),
        chunks.cut_rows(mask),
        chunks.cut_drop(drop),
    )
    grads = lax.map(lambda x: _backward_chunk(call, blocks.keys, drop, *x), parts)
    dq, dk, dv = (chunks.joined(x).astype(like.dtype) for x, like in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, None, None


_blockwise.defvjp(usual_promotion(_forward), usual_promotion(_backward))


def _reachable(call: Call, top: Array, q: Array, k: Array) -> Array:
    """The largest logits [B, N, S], less what rounding may take from them where queries and keys are large.

    The backward pass sums its products in another order: the logit that was the largest may come out lower, by some 2**-22 of the
    lengths of its vectors. Where that is much for an exponent, it would lose its weight, often the only one of its row.
    """
    if call.soft_cap is not None:
        return top

    def lengths(x: Array) -> Array:
        return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1))

    keys = jnp.repeat(lengths(k).max(-1, keepdims=True), q.shape[1] // k.shape[1], axis=1)
    return top - jnp.maximum(lengths(q) * keys * np.float32(call.scale * 2.0**-22) - np.float32(2.0**-8), 0.0)


def _backward_chunk(
    call: Call,
    block: int,
    drop: Dropout | None,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    top: Array,
    log_total: Array,
    mean: Array,
    mask: MaskSpec,
    rows: Array | None,
) -> tuple[Array, Array, Array]:
    """Gradients of a chunk: [R, J, G, S, H], [R, J, 1, S, H] twice."""
    drop = _of_rows(drop, rows)
    q, k, v = call.scaled(q), k[:, :, 0], v[:, :, 0]
    shape, dq = (*q.shape[:3], q.shape[4], q.shape[3]), None  # [R, J, G, H, S]
    dkv = []
    for band in _bands(mask, k.shape[2], q.shape[3], block, of_keys=True):
        seen = slice(band.other_first, band.other_end)
        query_mask = stretch_of_queries(mask, seen.start, seen.stop - seen.start)
        cut = tuple(x[:, :, :, seen] for x in (q, g, top, log_total, mean))

        def keys(first: Array | int, cut=cut, query_mask=query_mask, seen=seen) -> tuple[Array, Array, Array]:
            return _backward_block(call, drop, cut, query_mask, seen.start, k, v, mask, first, block)

        if band.end - band.first == block:
            part, *of_keys = keys(band.first)
        else:
            start = jnp.zeros((*shape[:4], seen.stop - seen.start), jnp.float32)
            part, of_keys = _summing_over_blocks(keys, start, band, block)
        dq = _added_at(dq, part, seen, shape)
        dkv.append(of_keys)
    dk, dv = _bands_joined([one[0] for one in dkv], 2), _bands_joined([one[1] for one in dkv], 2)
    assert dq is not None  # there is a band
    return call.scaled(dq.swapaxes(3, 4)), dk[:, :, None], dv[:, :, None]


def _backward_block(
    call: Call,
    drop: Dropout | None,
    cut: tuple[Array, ...],
    query_mask: MaskSpec,
    first_query: int,
    k: Array,
    v: Array,
    mask: MaskSpec,
    first: Array | int,
    block: int,
) -> tuple[Array, Array, Array]:
    """(dq transposed [R, J, G, H, s], dk, dv [R, J, t, H]) of a block of keys. Logits are [R, J, t, G, s]."""
    q, g, top, log_total, mean = cut
    compute = call.compute
    r, j, groups, s, h = q.shape
    keys, values = (lax.dynamic_slice_in_dim(x, first, block, 2) for x in (k, v))
    place, key_place = first_query + jnp.arange(s), first + jnp.arange(block)
    allowed = allowed_between(query_mask, stretch_of_keys(mask, first, block), mask.places(place), key_place)
    if allowed is not None:
        allowed = allowed.swapaxes(2, 3)[:, :, :, None]
    flat_q, flat_g = (x.reshape(r, j, groups * s, h) for x in (q, g))
    wide, flat = (r, j, block, groups, s), (r, j, block, groups * s)
    capped = call.capped(dot("rjth,rjsh->rjts", keys, flat_q, compute)).reshape(wide)
    weights = weights_again(allowed, capped, top[:, :, None], log_total[:, :, None])
    kept = None
    if drop is not None:
        kept = drop.kept(place, first, block).transpose(0, 1, 4, 2, 3)
    dv = dot("rjts,rjsh->rjth", dropped(weights, drop, kept).reshape(flat), flat_g, compute)
    dweights = dropped(dot("rjth,rjsh->rjts", values, flat_g, compute).reshape(wide), drop, kept)
    dlogits = call.before_cap(weights * (dweights - mean[:, :, None]), capped).reshape(flat)
    dk = dot("rjts,rjsh->rjth", dlogits, flat_q, compute)
    dq = dot("rjht,rjts->rjhs", keys.swapaxes(2, 3), dlogits, compute)
    return dq.reshape(r, j, h, groups, s).swapaxes(2, 3), dk, dv


def _of_rows(drop: Dropout | None, rows: Array | None) -> Dropout | None:
    return None if drop is None or rows is None else dataclasses.replace(drop, rows=rows)


def _bands_joined(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def _added_at(total: Array | None, part: Array, seen: slice, shape: tuple[int, ...]) -> Array:
    """``total``, or zeros of ``shape``, with ``part`` added where it was ``seen``. The first part of all needs no addition."""
    if total is None:
        return part if part.shape == shape else jnp.zeros(shape, part.dtype).at[..., seen].add(part)
    return total.at[..., seen].add(part)


def _over_blocks(
    function: Callable[[Array | int], tuple[Array, ...]], band: _Band, block: int, axis: int
) -> tuple[Array, ...]:
    """Results of ``function(first token)`` for each block, joined along ``axis``."""
    count = (band.end - band.first) // block
    if count == 1:
        return function(band.first)
    results = lax.map(function, band.first + block * jnp.arange(count))
    return tuple(_joined(x, axis) for x in results)


def _summing_over_blocks(
    function: Callable[[Array], tuple[Array, Array, Array]], start: Array, band: _Band, block: int
) -> tuple[Array, tuple[Array, Array]]:
    """The sum of the first result of ``function(first token)`` over all blocks, and the others joined along axis 2."""

    def step(total: Array, first: Array) -> tuple[Array, tuple[Array, Array]]:
        part, dk, dv = function(first)
        return total + part, (dk, dv)

    total, (dk, dv) = lax.scan(step, start, band.first + block * jnp.arange((band.end - band.first) // block))
    return total, (_joined(dk, 2), _joined(dv, 2))


def _joined(x: Array, axis: int) -> Array:
    """[blocks, ..., block, ...] with the first axis merged into what is then ``axis``."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
