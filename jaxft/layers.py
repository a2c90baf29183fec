"""The few layers all models are built from: pure functions, and thin Linen modules that declare their parameters.

Dims: B batch, S query length, T key length, D model width, N heads, H head size, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxft.sharding import DEFAULT_RULES, AxisNames, AxisRules

Array = jax.Array
Initializer = Callable[[Array, tuple[int, ...], Any], Array]


@dataclass(frozen=True)
class Compute:
    """How a model is computed, as opposed to what it computes. Static and hashable: part of every jit cache key."""

    activation_dtype: str = "float32"
    matmul_dtype: str = "float32"
    param_dtype: str = "float32"
    layers: Literal["unrolled", "scanned"] = "unrolled"
    remat: Literal["none", "full", "dots"] = "none"
    rules: AxisRules = DEFAULT_RULES


# ---------------------------------------------------------------------------------------------------------- matmul


def _batched(spec: str) -> bool:
    first, second, out = spec.replace("->", ",").split(",")
    return bool(set(first) & set(second) & set(out))


def _dot(spec: str, operand: str, x: Array, w: Array) -> Array:
    def direct(x: Array, w: Array) -> Array:
        # TPUs would round float32 operands without HIGHEST.
        precision = lax.Precision.HIGHEST if operand == "float32" else None
        return jnp.einsum(
            spec, x.astype(operand), w.astype(operand), preferred_element_type=jnp.float32, precision=precision
        )

    def widened(x: Array, w: Array) -> Array:
        wide = (y.astype(operand).astype(jnp.float32) for y in (x, w))
        return jnp.einsum(spec, *wide, preferred_element_type=jnp.float32)

    if operand == "float32" or not _batched(spec):
        return direct(x, w)
    # XLA's CPU backend (jaxlib 0.10.2) compiles some batched bf16 x bf16 -> f32 products and then fails to run them
    # ("UNIMPLEMENTED: Unsupported element type for DotThunk"). Products of bf16 numbers are exact in float32.
    return lax.platform_dependent(x, w, cpu=widened, default=direct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(spec: str, operand: str, result: str, x: Array, w: Array) -> Array:
    return _dot(spec, operand, x, w).astype(result)


def _einsum_fwd(spec: str, operand: str, result: str, x: Array, w: Array) -> tuple[Array, tuple[Any, ...]]:
    # The rounded operands are what the backward matmuls need: keeping them halves what is stored.
    kept = (x.astype(operand), w.astype(operand), np.empty(0, x.dtype), np.empty(0, w.dtype))
    return _einsum(spec, operand, result, x, w), kept


def _cpu_barrier(x: Array) -> Array:
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda y: y)


def _einsum_bwd(spec: str, operand: str, result: str, kept: tuple[Any, ...], g: Array) -> tuple[Array, Array]:
    x, w, x_like, w_like = kept
    (first, second), out = spec.split("->")[0].split(","), spec.split("->")[1]
    dx = _einsum(f"{out},{second}->{first}", operand, str(x_like.dtype), g, w)
    if x.size <= g.size or _batched(spec):
        dw = _einsum(f"{first},{out}->{second}", operand, str(w_like.dtype), x, g)
    else:
        # XLA's CPU backend copies the left operand of this product transposed, recomputing whatever made it in the bad
        # order: let the smaller one be left. The barrier keeps XLA from swapping them back to save the small transpose.
        shared = set(out) & set(first)
        natural = "".join(c for c in out + first if c not in shared)
        product = _einsum(f"{out},{first}->{natural}", operand, str(w_like.dtype), g, x)
        dw = jnp.einsum(f"{natural}->{second}", _cpu_barrier(product))
    return dx, dw


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def einsum(spec: str, x: Array, w: Array, compute: Compute) -> Array:
    """Two-operand einsum with operands in ``compute.matmul_dtype`` and float32 accumulation, forwards and backwards.

    Every index must occur in two of the three terms (no sums or broadcasts inside one operand). Left to itself, autodiff
    multiplies the float32 cotangent with a widened copy of the bf16 operand, at float32 speed; hence the custom VJP.
    """
    return _einsum(spec, compute.matmul_dtype, compute.activation_dtype, x, w)


# ------------------------------------------------------------------------------------------------------ activations


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """x * Phi(x) with the exact normal distribution function (Hendrycks & Gimpel 2016)."""
    return x * (0.5 * (1.0 + lax.erf(x * np.float32(np.sqrt(0.5)).astype(x.dtype))))


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Only x is kept for the backward pass; autodiff would keep erf and its derivative too.
    (x,), (t,) = primals, tangents
    cdf = 0.5 * (1.0 + lax.erf(x * np.float32(np.sqrt(0.5)).astype(x.dtype)))
    pdf = jnp.exp(-0.5 * x * x) * np.float32(1 / np.sqrt(2 * np.pi)).astype(x.dtype)
    return x * cdf, t * (cdf + x * pdf)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
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


# ---------------------------------------------------------------------------------------------------------- dropout


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability ``rate`` and scales the rest by 1 / (1 - rate). No key: returns ``x``.

    Bits come from counters over the global shape (``jax_threefry_partitionable``), so they do not depend on the mesh. One
    32-bit word serves two elements: the rate is exact to 2**-17 and the scale matches the rate actually used.
    """
    if key is None or rate == 0.0:
        return x
    keep = round((1.0 - rate) * 65536)
    *rest, last = x.shape
    words = jax.random.bits(key, (*rest, (last + 1) // 2), jnp.uint32)
    halves = lax.bitcast_convert_type(words, jnp.uint16).reshape(*rest, -1)[..., :last]
    return jnp.where(halves < keep, x * np.float32(65536 / keep).astype(x.dtype), jnp.zeros_like(x))


def subkey(key: Array | None, index: int | Array) -> Array | None:
    """The ``index``-th independent key below ``key``; None stays None (deterministic evaluation)."""
    return None if key is None else jax.random.fold_in(key, index)


# ---------------------------------------------------------------------------------------------------------- modules


class Labelled(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter with its logical axis names: exists between ``init`` and :func:`unlabel` only.

    Not flax's ``Partitioned``, which applies sharding constraints by itself when it is opened under a mesh.
    """

    value: Any
    names: AxisNames = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Labelled:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Labelled:
        return self.replace(names=(*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Labelled:
        return self.replace(names=self.names[:index] + self.names[index + 1 :])


def labelled(init: Initializer, *names: str | None) -> Callable[..., Any]:
    """An initializer whose result is :class:`Labelled` with logical axis names."""

    def init_labelled(key: Array, shape: tuple[int, ...], dtype: Any) -> Labelled:
        return Labelled(init(key, shape, dtype), names)

    return init_labelled


def unlabel(tree: Any) -> tuple[Any, Any]:
    """A tree of :class:`Labelled` leaves as (tree of values, tree of their axis names)."""

    def is_label(leaf: Any) -> bool:
        return isinstance(leaf, Labelled)

    return (
        jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=is_label),
        jax.tree.map(lambda leaf: leaf.names, tree, is_leaf=is_label),
    )


class Linear(nn.Module):
    """An affine map given as an einsum, for instance ``bsd,dnh->bsnh`` with kernel [D, N, H] and bias [N, H]."""

    spec: str
    shape: tuple[int, ...]
    names: AxisNames
    compute: Compute
    kernel_init: Initializer
    bias_dims: int = 1
    """Trailing kernel dimensions that the bias has."""
    bias_names: AxisNames | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.compute.param_dtype
        bias_names = self.names[-self.bias_dims :] if self.bias_names is None else self.bias_names
        kernel = self.param("kernel", labelled(self.kernel_init, *self.names), self.shape, dtype)
        bias = self.param("bias", labelled(nn.initializers.zeros, *bias_names), self.shape[-self.bias_dims :], dtype)
        y = einsum(self.spec, x, kernel, self.compute)
        return y + bias.astype(y.dtype)


class Projection(nn.Module):
    """Kernel [D, N, H] and bias [N, H] of an affine map to heads, for :func:`project_together`."""

    shape: tuple[int, int, int]
    names: AxisNames
    compute: Compute
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        dtype = self.compute.param_dtype
        kernel = self.param("kernel", labelled(self.kernel_init, *self.names), self.shape, dtype)
        return kernel, self.param("bias", labelled(nn.initializers.zeros, *self.names[1:]), self.shape[1:], dtype)


def project_together(x: Array, projections: Sequence[tuple[Array, Array]], compute: Compute) -> tuple[Array, ...]:
    """``x`` [B, S, D] through several projections of one shape as a single wide product; each result is [B, N, S, H].

    The stored tree keeps them apart; three narrow products were measured slower than one wide one.
    """
    kernels, biases = zip(*projections, strict=True)
    y = einsum("bsd,dpnh->bspnh", x, jnp.stack(kernels, axis=1), compute)
    y = (y + jnp.stack(biases).astype(y.dtype)).transpose(2, 0, 3, 1, 4)
    return _unstack(len(projections), y)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, statistics in float32 (Ba et al. 2016)."""

    eps: float
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.compute.param_dtype
        scale = self.param("scale", labelled(nn.initializers.ones, "norm"), x.shape[-1:], dtype)
        bias = self.param("bias", labelled(nn.initializers.zeros, "norm"), x.shape[-1:], dtype)
        return layer_norm(x, scale, bias, self.eps)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Layer normalisation of [..., D] with float32 statistics; the result has the type of ``x``."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normal = centred * lax.rsqrt(variance + eps)
    return (normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class Embed(nn.Module):
    """A table of vectors [V, D], looked up by integer id."""

    rows: int
    width: int
    names: AxisNames
    compute: Compute
    table_init: Initializer

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding", labelled(self.table_init, *self.names), (self.rows, self.width), self.compute.param_dtype
        )

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.embedding, ids, axis=0, mode="clip").astype(self.compute.activation_dtype)


# ------------------------------------------------------------------------------------------------------------ stacks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unstack(length: int, x: Array) -> tuple[Array, ...]:
    return tuple(lax.index_in_dim(x, i, keepdims=False) for i in range(length))


def _unstack_fwd(length: int, x: Array) -> tuple[tuple[Array, ...], None]:
    return _unstack(length, x), None


def _unstack_bwd(length: int, kept: None, g: tuple[Array, ...]) -> tuple[Array]:
    # One concatenation. Autodiff of slicing would add up L zero-padded copies of the whole stack.
    return (jnp.stack(g),)


_unstack.defvjp(_unstack_fwd, _unstack_bwd)


def stacked_params(parent: nn.Module, name: str, layer: nn.Module, length: int, *example: Any) -> Any:
    """Declares, on ``parent``, the parameters of ``length`` copies of ``layer``: each leaf gets a leading "layers" axis.

    Inside a ``compact`` method only. ``example``: arguments with which the layer can be initialised.
    """

    def init(key: Array) -> Any:
        trees = jax.vmap(lambda k: layer.init(k, *example)["params"])(jax.random.split(key, length))
        return nn.meta.add_axis(trees, 0, {nn.PARTITION_NAME: "layers"})

    return parent.param(name, init)


def apply_stack(layer: Any, params: Any, length: int, x: Array, key: Array | None, *args: Any) -> Array:
    """Runs ``length`` stacked layers, each ``layer.apply(params_i, x, key_i, *args) -> x``.

    Unrolled or scanned, with or without remat, as ``layer.compute`` says; the values are the same.
    """
    compute: Compute = layer.compute

    def run(layer_params: Any, x: Array, layer_key: Array | None) -> Any:
        return layer.apply({"params": layer_params}, x, layer_key, *args)

    if compute.remat != "none":
        keep = jax.checkpoint_policies.dots_saveable if compute.remat == "dots" else None
        run = jax.checkpoint(run, policy=keep)
    if compute.layers == "scanned":

        def body(x: Array, item: tuple[Any, Array]) -> tuple[Array, None]:
            layer_params, index = item
            return run(layer_params, x, subkey(key, index)), None

        return lax.scan(body, x, (params, jnp.arange(length)))[0]
    leaves, tree = jax.tree.flatten(params)
    for i, layer_leaves in enumerate(zip(*(_unstack(length, leaf) for leaf in leaves), strict=True)):
        x = run(tree.unflatten(layer_leaves), x, subkey(key, i))
    return x
