"""Backends ``fused``, ``splash`` and ``flash``: our Pallas TPU kernels and those that ship with jax, fed with mask data.

All know segments, not padding: padding keys become a segment that no query is of. Lengths are filled up to whole blocks in
the same way. Rows that may see nothing are zeroed here.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.attention.backends.scores import Call, nothing_where_blind
from jaxft.attention.dropout import Dropout
from jaxft.attention.fused import fused_attention
from jaxft.attention.fused.blocks import Spec
from jaxft.attention.mask import MaskSpec
from jaxft.attention.request import Request, each_device, first_of, same_tokens
from jaxft.layers import FixedRate, RunTimeRate
from jaxft.layers.bits import row_words

Array = jax.Array
_LANES = 128  # of a TPU's vector registers: lengths are multiples of it
_INTERPRET = False  # tests set it: kernels then run as ordinary operations, on any platform


def _filled(x: Array, axis: int, length: int) -> Array:
    more = [(0, 0)] * x.ndim
    more[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, more)


def _segments(mask: MaskSpec, rows: int, length: int, filled: int) -> tuple[Array, Array] | None:
    """int32 [B, filled] of queries and of keys such that equal numbers may see each other; None if all may."""
    if mask.segments is not None:
        # A query of padding, 0, may see padding keys: the same number; zeroed afterwards.
        segments = _filled(mask.segments.astype(jnp.int32), 1, filled)
        return segments, segments
    if mask.padding is None and filled == length:
        return None
    keys = jnp.ones((rows, length), jnp.int32) if mask.padding is None else mask.padding.astype(jnp.int32)
    return jnp.ones((rows, filled), jnp.int32), _filled(keys, 1, filled)


def _ready(
    call: Call, q: Array, k: Array, v: Array, mask: MaskSpec
) -> tuple[Array, Array, Array, tuple[Array, Array] | None]:
    """Queries, keys and values in the operand type with lengths filled up, and their segments."""
    length = q.shape[2]
    filled = -(-length // _LANES) * _LANES
    operand = call.compute.matmul_dtype
    q, k, v = (_filled(x.astype(operand), 2, filled) for x in (q, k, v))
    return q, k, v, _segments(mask, q.shape[0], length, filled)


def _finished(call: Call, out: Array, mask: MaskSpec, length: int) -> Array:
    return nothing_where_blind(out[:, :, :length].astype(call.compute.activation_dtype), mask, length)


def _kernel_refuses(request: Request) -> str | None:
    reason = first_of(
        (request.platform != "tpu", "runs on TPUs only"),
        (request.dropout is not None, "has no dropout"),
    )
    return reason or each_device(request) or same_tokens(request)


_FUSED_LENGTH = 2048
_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of vector memory a core


def fused_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    return first_of(
        (request.platform != "tpu", "runs on TPUs only"),
        (
            request.device is not None and request.device.startswith(_SMALL),
            f"needs more vector memory than a {request.device} has",
        ),
        (request.dropout == "threefry", "makes bits of dropout by hash only (model.dropout_bits)"),
        (request.length > _FUSED_LENGTH, f"holds whole rows of at most {_FUSED_LENGTH} tokens"),
        (request.size % 16 != 0 or request.size > 256, "takes head sizes that are multiples of 16, up to 256"),
        (
            request.heads // request.key_heads * min(request.length, 1024) > 8 * 1024,
            "unrolls over the query heads of a key head: these are too many for such rows",
        ),
    ) or (each_device(request) or same_tokens(request))


def fused_tokens_last(request: Request) -> bool:
    """See :class:`jaxft.attention.request.Backend`. Lengths that have to be filled up are moved anyway."""
    return request.length % _LANES == 0


def fused(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """Our kernels (:mod:`jaxft.attention.fused`): made for head sizes of 64, masks and dropout inside."""
    length = q.shape[2]
    q, k, v, segments = _ready(call, q, k, v, mask)
    spec = Spec(
        scale=call.scale,
        causal=mask.causal,
        window=mask.window,
        soft_cap=call.soft_cap,
        rate=0.0 if drop is None else drop.rate.value if isinstance(drop.rate, FixedRate) else None,
        row_length=length if drop is None else drop.length,
        interpret=_INTERPRET,
    )
    ids = None if segments is None else jnp.stack(segments, axis=1)
    words = None if drop is None else jnp.stack(row_words(drop.words, drop.rows))
    rate = drop.rate if drop is not None and isinstance(drop.rate, RunTimeRate) else None
    out = fused_attention(spec, q, k, v, ids, words, rate)[:, :, :length]  # zeros where nothing is seen, gradients too
    return out.astype(call.compute.activation_dtype)


def splash_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    return _kernel_refuses(request)


def _splash_block(length: int) -> int:
    """The largest block up to 1024 that divides a length (a multiple of 128)."""
    return next(block for block in (1024, 512, 256, 128) if length % block == 0)


@functools.lru_cache(maxsize=64)
def _splash_kernel(
    length: int, heads: int, causal: bool, window: int | None, grouped: bool, cap: float | None, interpret: bool
) -> Callable[..., Array]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    if window is not None:
        one: masks.Mask = masks.LocalMask(shape, window_size=(window - 1, 0 if causal else window - 1), offset=0)
    else:
        one = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    # By price: blocks of 1024 queries and 2048 keys are the largest that fit vector memory (benchmarks/attention_tpu.py); those of the
    # backward pass hold more, and of several rows the next one's lie beside them.
    block = _splash_block(length)
    keys = 2048 if length % 2048 == 0 else block
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=keys,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    make = kernels.make_splash_mqa_single_device if grouped else kernels.make_splash_mha_single_device
    with (
        jax.ensure_compile_time_eval()
    ):  # its block tables are constants of the kernel, not of the trace it is first used in
        made = make(
            masks.MultiHeadMask([one] * heads), block_sizes=sizes, attn_logits_soft_cap=cap, interpret=interpret
        )
    return cast(Callable[..., Array], made)


def splash(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """Splash attention: skips blocks that the causal or windowed mask empties; fused backward pass."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    # The kernel has no scale.
    q, k, v, segments = _ready(call, q * np.float32(call.scale).astype(q.dtype), k, v, mask)
    heads = groups if groups > 1 else q.shape[1]
    kernel = _splash_kernel(q.shape[2], heads, mask.causal, mask.window, groups > 1, call.soft_cap, _INTERPRET)
    ids = None if segments is None else kernels.SegmentIds(*segments)
    if groups > 1:
        queries = q.reshape(q.shape[0], k.shape[1], groups, *q.shape[2:])
        of_row = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        out = jax.vmap(of_row, in_axes=(0, 0, 0, None if ids is None else 0))(queries, k, v, ids).reshape(q.shape)
    else:
        out = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)
    return _finished(call, out, mask, length)


def flash_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    return _kernel_refuses(request) or first_of(
        (request.window is not None, "has no sliding window"),
        (request.soft_cap, "has no soft cap"),
    )


def flash(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """Flash attention of jax's Pallas operations; grouped key heads are repeated."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernels

    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    # Repeated before they are rounded, so that gradients of the copies are added up unrounded.
    k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    q, k, v, segments = _ready(call, q, k, v, mask)
    ids = None if segments is None else kernels.SegmentIds(*segments)
    block = min(512, _splash_block(q.shape[2]))
    sizes = kernels.BlockSizes(
        block_q=block,
        block_k_major=block,
        block_k=block,
        block_b=1,
        block_q_major_dkv=block,
        block_k_major_dkv=block,
        block_k_dkv=block,
        block_q_dkv=block,
        block_k_major_dq=block,
        block_k_dq=block,
        block_q_dq=block,
    )
    out = kernels.flash_attention(q, k, v, segment_ids=ids, causal=mask.causal, sm_scale=call.scale, block_sizes=sizes)
    return _finished(call, out, mask, length)
