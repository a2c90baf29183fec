"""Backend ``fused``: Pallas TPU kernels for rows whose keys and values fit vector memory: whole rows, no running softmax.

What makes them fast:

* Everything is transposed. Operands are [N H, B S] with tokens on the 128 lanes of a register, so a head size of 64 fills
  registers and memory (as [.., S, H] it takes twice the bytes); logits are [T, S], keys on sublanes: maxima, sums and
  normalisers are one number per lane. In products with probabilities those are what the matrix unit holds, and only the H
  rows of the other operand stream through it: half the time of the usual order when H = 64. Projections give this layout at
  no cost (:mod:`jaxft.layers.heads`).
* What may be seen is one bound per logit, made once for all heads of a row. So are the places that dropout hashes.
* The logits of the next heads are asked for before the softmax of the last: matrix and vector units work at the same time.

Bits of dropout are those of :mod:`jaxft.layers.bits`, made where they are used, in both directions. Prices of all sizes and
alternatives come from ``benchmarks/attention_tpu.py``: compiler estimates, for no TPU was at hand.

Dims: B batch, S query length, T key length (equal), N query heads, K key/value heads, G = N/K, H head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxft.attention.fused.blocks import LANES, Block, Dims, Sizes, Spec
from jaxft.layers import RunTimeRate
from jaxft.layers.bits import GOLDEN, mix
from jaxft.layers.promotion import usual_promotion

Array = jax.Array
T = TypeVar("T")

_MASKED, _SEEN = np.finfo(np.float32).min, np.finfo(np.float32).max  # what logits are at most
_LOG2E = np.float32(math.log2(math.e))
_TOP_BIT = np.uint32(1 << 31)

_AHEAD = 2**19  # logits that are asked for before they are needed
_VMEM_BYTES = 120 * 2**20  # what the compiler may use; it takes what it needs


def _bits(place: Array, a: Array, b: Array) -> Array:
    """The bits of :func:`jaxft.layers.keep_at` with the place times ``GOLDEN`` given, and the words a and b of the head, scalars: as signed
    integers in the same order, for TPUs compare no others."""
    # That is with the top bit flipped. A bit that is flipped before an odd factor is flipped behind it.
    return lax.bitcast_convert_type(mix(place + a, b ^ _TOP_BIT), jnp.int32)


def _below(keep: int) -> np.int32:
    """What the bits that are kept are below."""
    return np.int32((keep << 16) - (1 << 31))


def _scalars(rate: RunTimeRate) -> tuple[Array, Array]:
    """A rate that is an argument, as kernels take it: the largest bits that are kept, int32 [1], and the factor, float32 [1]."""
    # Of all that 16 bits can be, the first that is not kept is no int32 any more; sums and products wrap around.
    largest = (jnp.asarray(rate.keep, jnp.int32) - (1 << 15)) * (1 << 16) - 1
    return largest.reshape(1), jnp.asarray(rate.scale).reshape(1)


class _Task(NamedTuple):
    """Some queries of one head in a step, and the keys they may see."""

    q: tuple[Array, Array, slice]
    """Row, head, and which of the length: an index of a :class:`Block`. k: the same of keys."""
    k: tuple[Array, Array, slice]
    first: bool
    last: bool
    """Whether it is the first, or last, of its key head."""


@dataclass(frozen=True)
class _Step:
    """What both kernels have in common: one step of the grid."""

    spec: Spec
    sizes: Sizes
    heads: int
    """N. group: G. length: S."""
    group: int
    length: int
    words: jax.Ref | None
    """[2, B N] uint32, or None without dropout. first: where those of the step begin."""
    first: Array
    ids: jax.Ref | None
    """[rows, 2, S], or None without segments."""
    bound: jax.Ref | None
    """[rows or 1, T, S]: what a logit is at most, the largest or the least float32; None if all may be seen."""
    places: jax.Ref | None
    """[T, S] uint32, times ``GOLDEN``; or None without dropout."""
    rate: tuple[jax.Ref, jax.Ref] | None
    """References to the results of :func:`_scalars`; None: the rate is no argument."""

    def run(self, first_half: Callable[[_Task], T], second_half: Callable[[_Task, T], None]) -> None:
        """Runs the tasks. First halves, which need the matrix unit, are started some tasks before second halves."""
        # Later steps of the same rows find the scratch filled.
        pl.when(pl.program_id(1) == 0)(self.fill)
        heads, unroll = self.sizes.heads, self.sizes.unroll

        def some_heads(step: Array, _: None) -> None:
            at = [step * unroll + i for i in range(unroll)]
            tasks = [task for i in at for task in self.tasks(lax.div(i, heads), lax.rem(i, heads))]
            early = min(max(_AHEAD // (self.sizes.block * self.length), 1), len(tasks))
            ready = [first_half(task) for task in tasks[:early]]
            for i, task in enumerate(tasks):
                ready += [first_half(later) for later in tasks[i + early : i + early + 1]]
                second_half(task, ready.pop(0))

        lax.fori_loop(0, self.sizes.rows * heads // unroll, some_heads, None)

    def tasks(self, row: Array, key_head: Array) -> list[_Task]:
        """The tasks of one key head."""
        block = self.sizes.block
        cuts = [(g, start) for g in range(self.group) for start in range(0, self.length, block)]
        return [
            _Task(
                (row, key_head * self.group + g, slice(start, start + block)),
                (row, key_head, self.spec.keys_of(start, block, self.length)),
                (g, start) == cuts[0],
                (g, start) == cuts[-1],
            )
            for g, start in cuts
        ]

    def fill(self) -> None:
        """Makes what all heads of a row share, for 128 queries at a time."""
        shape = (self.length, LANES)
        t, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        starts = range(0, self.length, LANES)
        if self.places is not None:
            for start in starts:
                place = (lane + start) * self.spec.row_length + t
                self.places[:, start : start + LANES] = lax.bitcast_convert_type(place, jnp.uint32) * GOLDEN
        if self.bound is not None:
            self.fill_bound(self.bound, t - lane, starts)

    def fill_bound(self, bound: jax.Ref, ahead: Array, starts: range) -> None:
        """What may be seen; ``ahead`` [T, 128]: how many places a key is ahead of one of the first 128 queries."""
        for row in range(bound.shape[0]):
            ids = None if self.ids is None else self.ids[row]  # [2, S]
            keys = None if ids is None else jnp.broadcast_to(ids[1:2], ahead.shape[::-1]).T
            for start in starts:
                allowed = self.near(ahead - start)
                if ids is not None:
                    allowed += [keys == ids[0:1, start : start + LANES], keys != 0]
                seen = functools.reduce(jnp.logical_and, allowed)
                bound[row, :, start : start + LANES] = jnp.where(seen, _SEEN, _MASKED)

    def near(self, ahead: Array) -> list[Array]:
        """Conditions on how many places a key is ahead of a query."""
        window = self.spec.window
        causal = [ahead <= 0] if self.spec.causal else []
        return causal if window is None else [*causal, jnp.abs(ahead) < window]

    def exponents(self, task: _Task, products: Array) -> tuple[Array, Array | None]:
        """(logits for exp2, tanh of the soft cap) from k q^T [T, S]."""
        cap, cut = self.spec.soft_cap, None
        if cap is None:
            logits = products * np.float32(self.spec.scale * _LOG2E)
        else:
            cut = jnp.tanh(products * np.float32(self.spec.scale / cap))
            logits = cut * np.float32(cap * _LOG2E)
        if self.bound is not None:
            bound = self.bound[0 if self.ids is None else task.q[0], task.k[2], task.q[2]]
            logits = jnp.minimum(logits, bound)
        return logits, cut

    def dropped(self, task: _Task, *arrays: Array) -> tuple[Array, ...]:
        """[T, S] arrays, 0 where dropout drops."""
        if self.places is None or self.words is None:
            return arrays
        at = self.first + task.q[0] * self.heads + task.q[1]
        bits = _bits(self.places[task.k[2], task.q[2]], self.words[0, at], self.words[1, at])
        keep = bits < _below(self.spec.fixed_rate.keep) if self.rate is None else bits <= self.rate[0][0]
        return tuple(jnp.where(keep, x, np.float32(0.0)) for x in arrays)

    @property
    def drop_scale(self) -> Array | np.float32:
        """What kept probabilities are multiplied by."""
        return self.spec.fixed_rate.scale if self.rate is None else self.rate[1][0]


def _dot(x: Array, y: Array, *, over_last: bool = False) -> Array:
    """float32 x y, or x y^T."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1 if over_last else 0,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _forward_kernel(step: _Step, q: Block, k: Block, v: Block, out: Block, top: Block, log_total: Block) -> None:
    def products(task: _Task) -> Array:
        return _dot(k[task.k].T, q[task.q])

    def softmax(task: _Task, ready: Array) -> None:
        logits, _ = step.exponents(task, ready)
        most = logits.max(0, keepdims=True)
        weights = jnp.exp2(logits - most)
        total = weights.sum(0, keepdims=True)
        (weights,) = step.dropped(task, weights)
        mixed = _dot(v[task.k], weights.astype(v.dtype))
        sees = most != _MASKED
        out[task.q] = (mixed * jnp.where(sees, step.drop_scale / total, 0.0)).astype(out.dtype)
        # Of a query that sees nothing, so that the backward pass finds no weight.
        top[task.q] = jnp.where(sees, most, _SEEN)
        # Not added up: float32 has no digits for the logarithm beside a large logit.
        log_total[task.q] = jnp.log2(total)

    step.run(products, softmax)


def _backward_kernel(
    step: _Step,
    q: Block,
    k: Block,
    v: Block,
    out: Block,
    top: Block,
    log_total: Block,
    g: Block,
    dq: Block,
    dk: Block,
    dv: Block,
    sums: jax.Ref,
) -> None:
    drop_scale = step.drop_scale  # of dweights: left out, and made up for in the results
    scale = np.float32(step.spec.scale) * drop_scale

    def products(task: _Task) -> tuple[Array, Array]:
        return _dot(k[task.k].T, q[task.q]), _dot(v[task.k].T, g[task.q])

    def gradients(task: _Task, ready: tuple[Array, Array]) -> None:
        logits, cut = step.exponents(task, ready[0])
        queries, grad = q[task.q], g[task.q]
        # sum_t weights * dweights
        mean = (out[task.q].astype(jnp.float32) * grad.astype(jnp.float32)).sum(0, keepdims=True) / drop_scale
        weights = jnp.exp2(jnp.minimum(logits - top[task.q], np.float32(0.0)) - log_total[task.q])
        kept, dweights = step.dropped(task, weights, ready[1])
        dlogits = weights * (dweights - mean)
        if cut is not None:
            dlogits *= 1.0 - cut * cut
        dlogits = dlogits.astype(q.dtype)
        dq[task.q] = (_dot(k[task.k], dlogits) * scale).astype(dq.dtype)
        of_keys = _dot(queries, dlogits, over_last=True), _dot(grad, kept.astype(q.dtype), over_last=True)
        if not (task.first and task.last):
            _collect(task, sums, of_keys)
            of_keys = sums[0], sums[1]
        if task.last:
            dk[task.k[:2]] = (of_keys[0] * scale).astype(dk.dtype)
            dv[task.k[:2]] = (of_keys[1] * drop_scale).astype(dv.dtype)

    step.run(products, gradients)


def _collect(task: _Task, sums: jax.Ref, parts: tuple[Array, Array]) -> None:
    """Adds gradients of a task's keys to ``sums`` [2, H, T]."""
    keys = task.k[2]
    whole = keys == slice(0, sums.shape[2])
    if task.first and not whole:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
    for i, part in enumerate(parts):
        sums[i, :, keys] = part if task.first and whole else sums[i, :, keys] + part


def _call(
    kernel: Callable[..., None],
    spec: Spec,
    dims: Dims,
    arrays: tuple[Array, ...],
    ids: Array | None,
    words: Array | None,
    rate: RunTimeRate | None,
    outs: list[jax.ShapeDtypeStruct],
) -> list[Array]:
    """Runs a kernel on arrays [N or K times H, B S], or [N, 1, B S]; q is the first of them."""
    b, n, kv, s, h = dims
    sizes, drop = Sizes.of(spec, dims, arrays[0].dtype.itemsize), spec.drops
    grid = (b // sizes.rows, kv // sizes.heads)
    scalars = [words.reshape(2, b * n)] if drop and words is not None else []
    scalars += [] if rate is None else _scalars(rate)
    scratch: dict[str, pl.MemoryRef] = {}
    if ids is not None or spec.causal or spec.window is not None:
        scratch["bound"] = pltpu.VMEM((1 if ids is None else sizes.rows, s, s), jnp.float32)
    if drop:
        scratch["places"] = pltpu.VMEM((s, s), jnp.uint32)
    if kernel is _backward_kernel:
        scratch["sums"] = pltpu.VMEM((2, h, s), jnp.float32)

    def body(*refs: jax.Ref) -> None:
        given = iter(refs)
        words_ref = next(given) if drop else None
        of_rate = None if rate is None else (next(given), next(given))
        ids_ref = None if ids is None else next(given)
        operands = [Block(next(given), h, s) for _ in (*arrays, *outs)]
        held = {name: next(given) for name in scratch}
        bound, places = held.pop("bound", None), held.pop("places", None)
        # Not inside the loop over heads: there, an interpreted kernel has no program_id.
        first = (pl.program_id(0) * sizes.rows * n) + pl.program_id(1) * (n // grid[1])
        kernel(
            _Step(spec, sizes, n, n // kv, s, words_ref, first, ids_ref, bound, places, of_rate),
            *operands,
            *held.values(),
        )

    def heads_of(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        block = (x.shape[0] // grid[1], *x.shape[1:-1], sizes.rows * s)
        return pl.BlockSpec(block, lambda i, j, *_: (j, i) if len(block) == 2 else (j, 0, i))

    rows = pl.BlockSpec((sizes.rows, 2, s), lambda i, j, *_: (i, 0, 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=grid,
        in_specs=[*([] if ids is None else [rows]), *map(heads_of, arrays)],
        out_specs=[heads_of(x) for x in outs],
        scratch_shapes=list(scratch.values()),
    )
    order = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES)
    name = f"fused_attention{kernel.__name__}"
    run = pl.pallas_call(body, outs, grid_spec=grid_spec, compiler_params=order, interpret=spec.interpret, name=name)
    return run(*scalars, *([] if ids is None else [ids]), *arrays)


def _flat(x: Array) -> Array:
    """[B, N, S, H] as [N H, B S]."""
    b, n, s, h = x.shape
    return x.transpose(1, 3, 0, 2).reshape(n * h, b * s)


def _unflat(x: Array, dims: Dims) -> Array:
    """The inverse of :func:`_flat`."""
    return x.reshape(-1, dims.size, dims.rows, dims.length).transpose(2, 0, 3, 1)


def _fwd(
    spec: Spec, q: Array, k: Array, v: Array, ids: Array | None, words: Array | None, rate: RunTimeRate | None
) -> tuple[Array, Array, Array]:
    """Attention and its normaliser, in two parts.

    Args:
      q: [B, N, S, H]; S a multiple of 128. k, v: [B, K, S, H].
      ids: int32 [B, 2, S], of queries and of keys: equal ones may see each other; no one sees keys of 0. None: all.
      words: of dropout, uint32 [2, B, N], from :func:`jaxft.layers.bits.row_words`; not used at rate 0.
      rate: of dropout, where ``spec`` does not say it.

    Returns: (out [B, N, S, H], the largest of a query's logits in base 2 [N, 1, B S] float32, log2 of the sum of exp2 beside
      it). Of queries that see nothing: 0, and the largest float32.
    """
    (b, n, s, h), kv = q.shape, k.shape[1]
    if s % LANES or n % kv:
        raise ValueError(f"S={s}, N={n}, K={kv}: S must be a multiple of {LANES}, N one of K")
    dims = Dims(b, n, kv, s, h)
    number = jax.ShapeDtypeStruct((n, 1, b * s), jnp.float32)
    outs = [jax.ShapeDtypeStruct((n * h, b * s), q.dtype), number, number]
    out, top, log_total = _call(_forward_kernel, spec, dims, (_flat(q), _flat(k), _flat(v)), ids, words, rate, outs)
    return _unflat(out, dims), top, log_total


def _bwd(
    spec: Spec,
    q: Array,
    k: Array,
    v: Array,
    ids: Array | None,
    words: Array | None,
    rate: RunTimeRate | None,
    out: Array,
    top: Array,
    log_total: Array,
    g: Array,
) -> tuple[Array, ...]:
    """Gradients of q, k and v, from what :func:`_fwd` took and gave and the gradient of ``out``."""
    (b, n, s, h), kv = q.shape, k.shape[1]
    dims = Dims(b, n, kv, s, h)
    flat = [_flat(x) for x in (q, k, v, out, g)]
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[:3]]
    arrays = (*flat[:4], top, log_total, flat[4])
    return tuple(_unflat(x, dims) for x in _call(_backward_kernel, spec, dims, arrays, ids, words, rate, outs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_attention(
    spec: Spec,
    q: Array,
    k: Array,
    v: Array,
    ids: Array | None,
    words: Array | None,
    rate: RunTimeRate | None = None,
) -> Array:
    """The first result of :func:`_fwd`, with gradients."""
    return _fwd(spec, q, k, v, ids, words, rate)[0]


_Saved = tuple[Array, Array, Array, Array | None, Array | None, RunTimeRate | None, Array, Array, Array]


def _attention_fwd(
    spec: Spec, q: Array, k: Array, v: Array, ids: Array | None, words: Array | None, rate: RunTimeRate | None
) -> tuple[Array, _Saved]:
    out, top, log_total = _fwd(spec, q, k, v, ids, words, rate)
    return out, (q, k, v, ids, words, rate, out, top, log_total)


def _attention_bwd(spec: Spec, saved: _Saved, g: Array) -> tuple[Array | None, ...]:
    q, k, v, ids, words, rate, out, top, log_total = saved
    return (*_bwd(spec, q, k, v, ids, words, rate, out, top, log_total, g), None, None, None)


fused_attention.defvjp(usual_promotion(_attention_fwd), usual_promotion(_attention_bwd))
