"""Activations, dropout and normalisation: pure functions."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Float32, Integer, PRNGKeyArray

from jaxft.layers.bits import hash_words, keep_at
from jaxft.layers.matmul import Activation, recomputed_from
from jaxft.layers.promotion import usual_promotion
from jaxft.layers.rates import FixedRate, Rate, RunTimeRate, known_rate

Array = jax.Array


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1.0 + lax.erf(x * np.float32(np.sqrt(0.5)).astype(x.dtype)))


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * Phi(x) with the exact normal distribution function (Hendrycks & Gimpel 2016).

    Keeps only ``x`` for its backward pass; autodiff would keep its derivative too.
    """
    return x * _normal_cdf(x)


def _gelu_bwd(x: Array, g: Array) -> tuple[Array]:
    x, g = recomputed_from(x, g)
    density = jnp.exp(-0.5 * x * x) * np.float32(1 / np.sqrt(2 * np.pi)).astype(x.dtype)
    return (g * (_normal_cdf(x) + x * density),)


gelu.defvjp(usual_promotion(lambda x: (gelu(x), x)), usual_promotion(_gelu_bwd))


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Activation] = {
    # Names as in the reference's config files; several spell the same function.
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10.0, 10.0),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "hardswish": jax.nn.hard_swish,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "laplace": lambda x: 0.5 * (1.0 + lax.erf((x - 0.707107) / np.float32(0.282095 * np.sqrt(2.0)))),
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}


def dropout(
    x: Float[Array, "*shape"],
    rate: Rate,
    key: PRNGKeyArray | None,
    bits: Literal["threefry", "hash"] = "threefry",
) -> Float[Array, "*shape"]:
    """Zeroes each element with probability ``rate`` and scales the rest by 1 / (1 - rate). No key: returns ``x``.

    Bits come from counters over the global shape, so they do not depend on the mesh: of threefry
    (``jax_threefry_partitionable``), one 32-bit word for two elements, kept for the backward pass as a bool array; or of a hash
    (:mod:`jaxft.layers.bits`), made where they are used and made again in the backward pass. The rate is exact to 2**-17 and
    the scale matches the rate actually used.
    """
    if key is None or rate == 0.0:
        return x
    if bits == "hash":
        return _hash_dropout(x, known_rate(rate), hash_words(key))
    mask, scale = keep_mask(key, rate, x.shape)
    return jnp.where(mask, x * scale.astype(x.dtype), jnp.zeros_like(x))


@jax.custom_vjp
def _hash_dropout(x: Array, rate: FixedRate | RunTimeRate, words: tuple[Array, Array]) -> Array:
    """The last two dimensions are counted as the place, those before as the row."""
    *rest, s, d = (1, 1, *x.shape)
    if s * d > 2**32:
        raise ValueError(f"dropout of {x.shape}: the last two dimensions must not exceed 2**32 elements")
    row = jnp.arange(int(np.prod(rest)), dtype=jnp.uint32).reshape(*rest, 1, 1)
    place = jnp.arange(s, dtype=jnp.uint32)[:, None] * np.uint32(d) + jnp.arange(d, dtype=jnp.uint32)
    mask, scale = keep_at(words, rate, row, place)
    return jnp.where(mask.reshape(x.shape), x * scale.astype(x.dtype), jnp.zeros_like(x))


_KeptOfHash = tuple[FixedRate | RunTimeRate, tuple[Array, Array]]


def _hash_dropout_fwd(x: Array, rate: FixedRate | RunTimeRate, words: tuple[Array, Array]) -> tuple[Array, _KeptOfHash]:
    return _hash_dropout(x, rate, words), (rate, words)


def _hash_dropout_bwd(kept: _KeptOfHash, g: Array) -> tuple[Array, None, None]:
    rate, words = kept
    words, g = recomputed_from(words, g)
    return _hash_dropout(g, rate, words), None, None


_hash_dropout.defvjp(usual_promotion(_hash_dropout_fwd), usual_promotion(_hash_dropout_bwd))


def keep_mask(
    key: PRNGKeyArray, rate: Rate, shape: tuple[int, ...]
) -> tuple[Bool[Array, "*_"], np.float32 | Float32[Array, ""]]:
    """What :func:`dropout` keeps, as a bool array of ``shape``, and the scale of what is kept."""
    known = known_rate(rate)
    *rest, last = shape
    words = jax.random.bits(key, (*rest, (last + 1) // 2), jnp.uint32)
    halves = lax.bitcast_convert_type(words, jnp.uint16).reshape(*rest, -1)[..., :last]
    return known.keeps(halves), known.scale


ALWAYS = 1 << 16
"""How often :func:`drop_rows` keeps a row that it always keeps."""


def drop_rows(x: Float[Array, "*shape"], kept: Integer[Array, ""], key: PRNGKeyArray) -> Float[Array, "*shape"]:
    """Zeroes rows, whole, and scales the rest by how many there are (stochastic depth, Huang et al. 2016).

    Args:
      kept: how often a row is kept, in parts of :data:`ALWAYS`; an array, so that layers of a scan may differ.
    """
    drawn = jax.random.bits(key, (len(x), *(1,) * (x.ndim - 1)), jnp.uint32) >> 16
    scale = (ALWAYS / kept.astype(jnp.float32)).astype(x.dtype)
    return jnp.where(drawn < kept, x * scale, jnp.zeros_like(x))


def subkey(key: PRNGKeyArray | None, index: int | Integer[Array, ""]) -> PRNGKeyArray | None:
    """The ``index``-th independent key below ``key``; None stays None (deterministic evaluation)."""
    return None if key is None else jax.random.fold_in(key, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*rows D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*rows D"]:
    """Layer normalisation of [..., D] with float32 statistics; the result has the type of ``x``.

    Keeps ``x`` and its statistics for the backward pass, no third array of its size.
    """
    return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    inverse = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    out = centred * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return out.astype(x.dtype), (x, scale, bias, mean, inverse)


def _layer_norm_bwd(eps: float, kept: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, inverse = kept
    x, g = recomputed_from(x, g)
    normal, wide = (x.astype(jnp.float32) - mean) * inverse, g.astype(jnp.float32)
    of_normal = wide * scale.astype(jnp.float32)
    along = (of_normal * normal).mean(-1, keepdims=True)
    dx = inverse * (of_normal - of_normal.mean(-1, keepdims=True) - normal * along)
    rows = tuple(range(x.ndim - 1))
    dscale, dbias = (wide * normal).sum(rows), wide.sum(rows)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


layer_norm.defvjp(usual_promotion(_layer_norm_fwd), usual_promotion(_layer_norm_bwd))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """Root-mean-square normalisation of [..., D] with float32 statistics; the result has the type of ``x``.

    Keeps ``x`` and its statistics for the backward pass.
    """
    return _rms_norm_fwd(x, scale, eps)[0]


def _rms_norm_fwd(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, scale, inverse)


def _rms_norm_bwd(eps: float, kept: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    x, scale, inverse = kept
    x, g = recomputed_from(x, g)
    normal, wide = x.astype(jnp.float32) * inverse, g.astype(jnp.float32)
    of_normal = wide * scale.astype(jnp.float32)
    dx = inverse * (of_normal - normal * (of_normal * normal).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (wide * normal).sum(tuple(range(x.ndim - 1))).astype(scale.dtype)


rms_norm.defvjp(usual_promotion(_rms_norm_fwd), usual_promotion(_rms_norm_bwd))
