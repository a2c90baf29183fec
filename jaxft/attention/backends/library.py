"""Backends ``jax``, ``cudnn`` and ``tokamax``: functions of other libraries, fed with what they understand.

They take mask arrays, so that the mask is made here, whole; a row that may see nothing is zeroed here, for they would give it
the mean of all values.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.attention.backends.scores import Call, nothing_where_blind
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.attention.request import Request, each_device, first_of, same_tokens, whole_rows

Array = jax.Array


def _arguments(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, bias: Array | None) -> dict[str, Any]:
    """What both functions take: arrays [B, S, N, H] in the type of matmul operands, the mask as an array; of a plain causal
    mask they are told instead: kernels then skip what none may see, and no array of that size exists. A bias takes the mask
    in: theirs is a finite number, which a bias may be below. It stays float32: bfloat16 has no number for the least float32."""
    operand = call.compute.matmul_dtype
    q, k, v = (x.astype(operand).swapaxes(1, 2) for x in (q, k, v))
    if bias is not None:
        bias, _ = _seen_bias(bias, mask)
        return {"query": q, "key": k, "value": v, "bias": bias, "mask": None, "is_causal": False, "scale": call.scale}
    square = q.shape[1] == k.shape[1] and not mask.shifted
    causal = mask.causal and mask.window is None and square
    allowed = (dataclasses.replace(mask, causal=False) if causal else mask).allowed(q.shape[1], k.shape[1])
    if allowed is not None:  # broadcast here: kernels have failed on [B, 1, 1, T] (jax #28974)
        allowed = jnp.broadcast_to(allowed, (q.shape[0], 1, q.shape[1], k.shape[1]))
    return {"query": q, "key": k, "value": v, "bias": None, "mask": allowed, "is_causal": causal, "scale": call.scale}


def _seen_bias(bias: Array, mask: MaskSpec) -> tuple[Array, Array]:
    """The bias, -inf where the mask hides a key, and [B or 1, N or 1, S, 1] whether a query sees any: others get zeros, of
    which a softmax has a gradient."""
    bias, allowed = bias.astype(jnp.float32), mask.allowed(*bias.shape[2:])
    bias = bias if allowed is None else jnp.where(allowed, bias, -jnp.inf)
    sees = (bias != -jnp.inf).any(-1, keepdims=True)
    return jnp.where(sees, bias, 0.0), sees


def _finished(call: Call, out: Array, mask: MaskSpec, keys: int, bias: Array | None = None) -> Array:
    out = out.swapaxes(1, 2).astype(call.compute.activation_dtype)
    if bias is None:
        return nothing_where_blind(out, mask, keys)
    return jnp.where(_seen_bias(bias, mask)[1], out, jnp.zeros_like(out))


def _exactly(call: Call) -> contextlib.AbstractContextManager[object]:
    """What products of float32 are traced under: left alone, GPUs round their operands to TF32 and TPUs to bfloat16."""
    if call.compute.matmul_dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def _no_dropout_no_cap(request: Request) -> str | None:
    return first_of(
        (request.dropout is not None, "has no dropout"),
        (request.soft_cap, "has no soft cap"),
    )


def jax_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    return whole_rows(request) or _no_dropout_no_cap(request)


def jax_attention(
    call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, bias: Array | None, drop: Dropout | None
) -> Array:
    """``jax.nn.dot_product_attention``, compiled by XLA."""
    given = _arguments(call, q, k, v, mask, bias)
    if (call.compute.platform or jax.default_backend()) == "cpu":
        # XLA's CPU backend (jaxlib 0.12) rounds sums of bf16 products to bf16 on the way. In float32 those products are exact.
        given |= {name: given[name].astype(jnp.float32) for name in ("query", "key", "value")}
    with _exactly(call):
        out = jax.nn.dot_product_attention(**given, implementation="xla")
    return _finished(call, out, mask, k.shape[2], bias)


def cudnn_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    return (
        first_of(
            (request.platform != "gpu", "runs on GPUs only"),
            (request.operands not in ("bfloat16", "float16"), "takes 16-bit operands only (model.matmul_dtype)"),
            (request.size % 8 != 0 or request.size > 128, "takes head sizes that are multiples of 8, up to 128"),
            (request.length % 2 != 0, "takes even lengths only"),
        )
        or each_device(request)
        or same_tokens(request)
        or _no_dropout_no_cap(request)
    )


def cudnn(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """NVIDIA's fused kernel through ``jax.nn.dot_product_attention``.

    Masks reach it as a bias that is read from memory, which was measured to cost half as much again as attention itself (H100,
    512 tokens). Padding that stands behind the tokens is told as lengths instead.
    """
    lengths, seen = None, mask
    if call.compute.padding_last and mask.padding is not None:
        # A row of nothing but padding is zeroed below; the kernel gets one key.
        lengths = jnp.maximum(mask.padding.sum(-1, dtype=jnp.int32), 1)
        seen = dataclasses.replace(mask, padding=None)
    given = _arguments(call, q, k, v, seen, None)
    out = jax.nn.dot_product_attention(**given, key_value_seq_lengths=lengths, implementation="cudnn")
    return _finished(call, out, mask, k.shape[2])


def tokamax_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    return first_of(
        (importlib.util.find_spec("tokamax") is None, "is not installed (pip install tokamax)"),
        (request.dropout is not None, "has no dropout"),
    ) or (each_device(request) or same_tokens(request))


def tokamax(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """``tokamax.dot_product_attention``: its own choice of a Pallas kernel, or of XLA where it has none (on CPUs always)."""
    import tokamax as library  # pyrefly: ignore[missing-import]  # optional

    arguments = _arguments(call, q, k, v, mask, None)
    with _exactly(call):
        out = library.dot_product_attention(**arguments, logits_soft_cap=call.soft_cap)
    return _finished(call, out, mask, k.shape[2])
