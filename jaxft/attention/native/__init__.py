"""Backend ``native``: our C++ kernels for CPUs (``native.cc``), called by XLA, on the threads that it computes with.

A block of logits stays in a core's caches; nothing of the square of the length is ever in memory, in either pass (Dao et al. 2022).
Padding, segments, causality and windows are honoured by place, and blocks of which nothing may be seen are skipped. bfloat16 numbers
are multiplied as such, twice as many at a time, by processors that can (AVX512-BF16); by others, they are widened: operands are
rounded then, and what is computed from them is not. Sums are float32.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.attention.backends.scores import Call
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.attention.native.compiled import BACKWARD, ENDINGS, FORWARD, multiplies_bfloat16, unavailable
from jaxft.attention.request import Request, each_device, first_of, unshifted
from jaxft.layers import RunTimeRate
from jaxft.layers.promotion import usual_promotion

Array = jax.Array
_WIDEST = 16  # floats of a vector register, at most
_BEHIND_WORDS = -1  # what kernels are told instead of a threshold that is an argument


def native_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    reason = first_of(
        (request.platform != "cpu", "runs on CPUs only"),
        (request.size % _WIDEST != 0, f"takes head sizes that are multiples of {_WIDEST}"),
        (request.dropout == "threefry", "draws no threefry bits (model.dropout_bits=hash)"),
        (request.soft_cap, "has no soft cap"),
    )
    return reason or each_device(request) or unshifted(request) or unavailable()


def native(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """See :func:`jaxft.attention.attend`; no soft cap, no bias, hash dropout."""
    return _native(call, q, k, v, mask, drop)


_Kept = tuple[Array, Array, Array, MaskSpec, Dropout | None, Array, Array]
"""q, k, v, mask and dropout of a call, its result, and two numbers per query."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    return _forward(call, q, k, v, mask, drop)[0]


def _forward(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> tuple[Array, _Kept]:
    types = _types(call, q)
    out, sums = _run(_kernel(FORWARD, types, call, mask, drop), *_inputs(call, types, q, k, v, mask, drop))
    return out.astype(call.compute.activation_dtype), (q, k, v, mask, drop, out, sums)


def _backward(call: Call, kept: _Kept, g: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, drop, out, sums = kept
    _, dtype = types = _types(call, q)
    inputs = (*_inputs(call, types, q, k, v, mask, drop), out, sums, g.astype(dtype))
    grads = _run(_kernel(BACKWARD, types, call, mask, drop), *inputs)
    return *(dx.astype(x.dtype) for dx, x in zip(grads, (q, k, v), strict=True)), None, None


_native.defvjp(usual_promotion(_forward), usual_promotion(_backward))


def _types(call: Call, q: Array) -> tuple[str, str]:
    """Type names: what kernels multiply, and the arrays that they take and return."""
    compute = call.compute
    divides = q.shape[-1] % (2 * _WIDEST) == 0
    if not (compute.matmul_dtype == "bfloat16" and divides and multiplies_bfloat16()):
        return "float32", "float32"
    return "bfloat16", compute.activation_dtype


def _inputs(
    call: Call, types: tuple[str, str], q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None
) -> tuple[Array, ...]:
    """q, k, v, numbers of queries [B, S] and of keys [B, T], words and rows of dropout; empty where there is nothing. A rate that is an
    argument stands behind the words: its threshold."""
    operand, dtype = types
    # Kernels that multiply bfloat16 round by themselves.
    rounded = dtype if operand == "bfloat16" else call.compute.matmul_dtype
    operands = (x.astype(rounded).astype(dtype) for x in (q, k, v))
    none = jnp.zeros((0,), jnp.uint32)
    words, rows = (none, none) if drop is None else (jnp.stack(_words(drop)), drop.rows)
    return *operands, *_ids(mask, q.shape[2]), words, rows


def _words(drop: Dropout) -> tuple[Array, ...]:
    keep = (jnp.asarray(drop.rate.keep, jnp.uint32),) if isinstance(drop.rate, RunTimeRate) else ()
    return *drop.words, *keep


def _ids(mask: MaskSpec, length: int) -> tuple[Array, Array]:
    """Numbers for queries and for keys: a query sees the keys that have its own number, and none of number 0."""
    if mask.segments is not None and mask.of_keys is not None:
        return mask.segments, mask.of_keys
    if mask.padding is not None:
        keys = mask.padding.astype(jnp.int32)
        return jnp.ones((keys.shape[0], length), jnp.int32), keys
    none = jnp.zeros((0,), jnp.int32)
    return none, none


@dataclass(frozen=True)
class _Kernel:
    """The static part of a call of a C++ kernel."""

    backward: bool
    ending: str
    dtype: str
    """Type of the arrays that it takes and gives."""
    causal: bool
    window: int
    scale: float
    keep: int
    """Threshold of dropout. 0: none; ``_BEHIND_WORDS``: it is an argument."""

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Results for one device's arrays."""
        q, k, v, *_ = inputs
        shapes = [x.shape for x in ((q, k, v) if self.backward else (q,))]
        results = [jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes]
        if not self.backward:
            results.append(jax.ShapeDtypeStruct((*q.shape[:3], 2), jnp.float32))
        facts = {name: np.int64(getattr(self, name)) for name in ("causal", "window", "keep")}
        name = (BACKWARD if self.backward else FORWARD) + self.ending
        return tuple(jax.ffi.ffi_call(name, tuple(results))(*inputs, scale=np.float32(self.scale), **facts))


def _kernel(name: str, types: tuple[str, str], call: Call, mask: MaskSpec, drop: Dropout | None) -> _Kernel:
    keep = 0 if drop is None else _BEHIND_WORDS if isinstance(drop.rate, RunTimeRate) else drop.rate.keep
    return _Kernel(name == BACKWARD, ENDINGS[types], types[1], mask.causal, mask.window or 0, call.scale, keep)


# ------------------------------------------------------------------------------------- under vmap, and on any mesh


def _run(kernel: _Kernel, *inputs: Array) -> tuple[Array, ...]:
    """``kernel(*inputs)``, of which ``vmap`` makes more rows, and the compiler as many calls as devices that have rows or heads."""

    @jax.custom_batching.custom_vmap
    def run(*inputs: Array) -> tuple[Array, ...]:
        alike = tuple(inputs[0].shape[axis] == inputs[1].shape[axis] for axis in (1, 2))
        return _partitioned(kernel, *alike, tuple(x.ndim for x in inputs))(*inputs)

    @run.def_vmap
    def more_rows(size: int, mapped: list[bool], *inputs: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        wide = [x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in zip(inputs, mapped, strict=True)]
        if mapped[_WORDS] and inputs[_WORDS].size:  # a key for each: the rows of a call share one
            results = jax.lax.map(lambda x: run(*x), tuple(wide))
        else:
            merged = [x.reshape(-1, *x.shape[2:]) if x.size else x[0] for x in wide]
            merged[_WORDS] = wide[_WORDS][0]
            results = tuple(x.reshape(size, -1, *x.shape[1:]) for x in run(*merged))
        return results, (True,) * len(results)

    return tuple(run(*inputs))


_WORDS = 5  # which of the inputs


class _Placed(Protocol):
    """An argument or result as the compiler has placed it."""

    @property
    def sharding(self) -> NamedSharding: ...


_TERMS = ("b n s h", "b k t h", "b k t h", "b s", "b t", "w", "b n", "b n s h", "b n s u", "b n s h")


@functools.lru_cache(maxsize=256)
def _partitioned(kernel: _Kernel, same_heads: bool, same_length: bool, dims: tuple[int, ...]) -> custom_partitioning:
    """The kernel as a function that the compiler may run on parts of the rows and, unless they are grouped, of the heads.

    Otherwise it would gather all rows on every device, where a mesh that is not a run's (:func:`jaxft.parallel.sharding.run_mesh`) splits
    them. On one device, and inside a ``shard_map``, it is the plain call.
    """
    terms = [term if len(term.split()) == n else "z" for term, n in zip(_TERMS, dims, strict=False)]
    results = _TERMS[:3] if kernel.backward else ("b n s h", "b n s u")
    rule = f"{', '.join(terms)} -> {', '.join(results)}"
    rule = rule.replace("k", "n") if same_heads else rule
    rule = rule.replace("t", "s") if same_length else rule
    split = ("b", "n") if same_heads else ("b",)
    whole = [name for name in dict.fromkeys(rule.replace(",", "").replace("->", "").split()) if name not in split]

    def partition(
        mesh: Mesh, arguments: tuple[_Placed, ...], results: tuple[_Placed, ...]
    ) -> tuple[Mesh, _Kernel, tuple[NamedSharding, ...], tuple[NamedSharding, ...]]:
        rows, heads = (*arguments[0].sharding.spec, None, None)[:2]
        axes = {"b": rows, "n": heads if same_heads else None}

        def place(term: str) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(axes.get(name) for name in term.split())))

        given, made = (tuple(place(term) for term in side.split(", ")) for side in rule.split(" -> "))
        return mesh, kernel, made, given

    run = custom_partitioning(lambda *inputs: kernel(*inputs))
    run.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(whole))
    return run
