"""Backend ``native``: our C++ kernels for CPUs (``native.cc``), called by XLA, on the threads that it computes with.

A block of logits stays in a core's caches; nothing of the square of the length is ever in memory, in either pass (Dao et al. 2022).
Padding, segments, causality and windows are honoured by place, and blocks of which nothing may be seen are skipped. bfloat16 numbers
are multiplied as such, twice as many at a time, by processors that can (AVX512-BF16); by others, they are widened: operands are
rounded then, and what is computed from them is not. Sums are float32.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.attention.compiled import BACKWARD, ENDINGS, FORWARD, multiplies_bfloat16, unavailable
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.attention.request import Request, each_device, first_of
from jaxft.attention.scores import Call

Array = jax.Array
_WIDEST = 16  # floats of a vector register, at most


def native_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    reason = first_of(
        (request.platform != "cpu", "runs on CPUs only"),
        (request.size % _WIDEST != 0, f"takes head sizes that are multiples of {_WIDEST}"),
        (request.dropout == "threefry", "draws no threefry bits (model.dropout_bits=hash)"),
        (request.soft_cap, "has no soft cap"),
    )
    return reason or each_device(request) or unavailable()


def native(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """See :func:`jaxft.attention.attend`; no soft cap, no bias, hash dropout."""
    return _native(call, q, k, v, mask, drop)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    return _forward(call, q, k, v, mask, drop)[0]


def _forward(
    call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None
) -> tuple[Array, tuple[Any, ...]]:
    _, dtype = types = _types(call, q)
    results = (jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32))
    inputs = _inputs(call, types, q, k, v, mask, drop)
    out, normaliser = jax.ffi.ffi_call(FORWARD + ENDINGS[types], results)(*inputs, **_facts(call, mask, drop))
    return out.astype(call.compute.activation_dtype), (q, k, v, mask, drop, out, normaliser)


def _backward(call: Call, kept: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, drop, out, normaliser = kept
    _, dtype = types = _types(call, q)
    results = tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x in (q, k, v))
    inputs = (*_inputs(call, types, q, k, v, mask, drop), out, normaliser, g.astype(dtype))
    grads = jax.ffi.ffi_call(BACKWARD + ENDINGS[types], results)(*inputs, **_facts(call, mask, drop))
    return *(dx.astype(x.dtype) for dx, x in zip(grads, (q, k, v), strict=True)), None, None


_native.defvjp(_forward, _backward)


def _types(call: Call, q: Array) -> tuple[str, str]:
    """Of what kernels multiply, and of the arrays that they take and give."""
    compute = call.compute
    divides = q.shape[-1] % (2 * _WIDEST) == 0
    if not (compute.matmul_dtype == "bfloat16" and divides and multiplies_bfloat16()):
        return "float32", "float32"
    return "bfloat16", compute.activation_dtype


def _inputs(
    call: Call, types: tuple[str, str], q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None
) -> tuple[Array, ...]:
    """q, k, v, who a token is to queries and to keys [B, S], words and rows of dropout; empty where there is nothing."""
    operand, dtype = types
    # Kernels that multiply bfloat16 round by themselves.
    rounded = dtype if operand == "bfloat16" else call.compute.matmul_dtype
    operands = (x.astype(rounded).astype(dtype) for x in (q, k, v))
    none = jnp.zeros((0,), jnp.uint32)
    words, rows = (none, none) if drop is None else (jnp.stack(drop.words), drop.rows)
    return *operands, *_ids(mask), words, rows


def _ids(mask: MaskSpec) -> tuple[Array, Array]:
    """Of queries and of keys: a query sees the keys of its own number; those of number 0 none does."""
    if mask.segments is not None:
        return mask.segments, mask.segments
    if mask.padding is not None:
        keys = mask.padding.astype(jnp.int32)
        return jnp.ones_like(keys), keys
    none = jnp.zeros((0,), jnp.int32)
    return none, none


def _facts(call: Call, mask: MaskSpec, drop: Dropout | None) -> dict[str, Any]:
    keep = 0 if drop is None else drop.keep
    return {
        "causal": np.int64(mask.causal),
        "window": np.int64(mask.window or 0),
        "scale": np.float32(call.scale),
        "keep": np.int64(keep),
    }
