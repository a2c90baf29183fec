"""Thin Linen modules: they declare parameters with their logical axes, and call functions.

Dims: D, E widths of inputs and outputs, V vocabulary.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.errors import ScopeParamShapeError
from jax.typing import DTypeLike
from jaxtyping import Float, Integer, PyTree

from jaxft.layers.compute import Compute
from jaxft.layers.embedding import look_up
from jaxft.layers.functions import layer_norm, rms_norm
from jaxft.layers.matmul import Operand, affine
from jaxft.parallel.sharding import AxisNames

Array = jax.Array
Initializer = Callable[[Array, tuple[int, ...], DTypeLike], Array]


class Labelled(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter with its logical axis names: exists between ``init`` and :func:`unlabel` only.

    Not flax's ``Partitioned``, which applies sharding constraints by itself when it is opened under a mesh.
    """

    value: Array
    names: AxisNames = struct.field(pytree_node=False)

    def unbox(self) -> Array:
        return self.value

    def replace_boxed(self, val: object) -> Labelled:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[str, str]) -> Labelled:
        return self.replace(names=(*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index: int, params: dict[str, str]) -> Labelled:
        return self.replace(names=self.names[:index] + self.names[index + 1 :])


def labelled(init: Initializer, *names: str | None) -> Callable[[Array, tuple[int, ...], DTypeLike], Labelled]:
    """An initializer whose result is :class:`Labelled` with logical axis names."""

    def init_labelled(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Labelled:
        return Labelled(init(key, shape, dtype), names)

    return init_labelled


def declare(
    module: nn.Module, name: str, init: Initializer, names: AxisNames, shape: tuple[int, ...], dtype: DTypeLike
) -> Array:
    """A parameter of ``module``: :class:`Labelled` with its logical axis names, or, in a module of someone else's that ours is
    a part of, a plain array, as Linen's own layers make them."""
    if module.has_variable("params", name):
        value = cast(Array, stored(module, name))
        if value.shape != shape:
            raise ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
        return value
    return cast(Array, module.param(name, labelled(init, *names) if is_ours(module) else init, shape, dtype))


def stored(module: nn.Module, name: str) -> PyTree[Array]:
    """A parameter that is there. Linen's own ``param`` would trace its initializer once more, at each call, to compare shapes: a
    third of the time in which a model is traced."""
    return nn.meta.unbox(module.get_variable("params", name))


_in_stack = contextvars.ContextVar("in_stack", default=False)


@contextlib.contextmanager
def labelled_stack() -> Iterator[None]:
    """Within it, parameters are :class:`Labelled` whoever's module declares them: a layer is initialised apart from its model."""
    before = _in_stack.set(True)
    try:
        yield
    finally:
        _in_stack.reset(before)


def is_ours(module: nn.Module) -> bool:
    """Whether the outermost module is one of this package, the ``Model`` of a family from another one, or a layer of its stack."""
    while isinstance(module.parent, nn.Module):
        module = module.parent
    ours = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
    return ours or hasattr(type(module), "facts") or _in_stack.get()


def unlabel(tree: PyTree[Labelled]) -> tuple[PyTree, PyTree]:
    """A tree of :class:`Labelled` leaves as (tree of values, tree of their axis names)."""

    def is_label(leaf: object) -> bool:
        return isinstance(leaf, Labelled)

    return (
        jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=is_label),
        jax.tree.map(lambda leaf: leaf.names, tree, is_leaf=is_label),
    )


class Linear(nn.Module):
    """An affine map of the last dimension of its input, with kernel [D, E] and bias [E]."""

    shape: tuple[int, int]
    names: AxisNames
    compute: Compute
    kernel_init: Initializer
    act: Callable[[Any], Array] | None = None
    """Applied to the input, see :func:`affine`."""
    biased: bool = True

    @nn.compact
    def __call__(self, x: Operand) -> Float[Array, "*_"]:
        dtype = self.compute.param_dtype
        kernel = declare(self, "kernel", self.kernel_init, self.names, self.shape, dtype)
        kernel = self.compute.rules.place_gradient(kernel, *self.names)
        bias = None
        if self.biased:
            bias = declare(self, "bias", nn.initializers.zeros, self.names[1:], self.shape[1:], dtype)
        letters = "ab"[: (x[0] if isinstance(x, tuple) else x).ndim - 1]
        return affine(f"{letters}d,de->{letters}e", x, kernel, bias, self.compute, self.act, self.names)


class LayerNorm(nn.Module):
    """Layer normalisation, (x - mean) / sqrt(variance + eps) * scale + bias over the last axis, statistics in float32 (Ba et al. 2016)."""

    eps: float
    compute: Compute
    biased: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        dtype = self.compute.param_dtype
        scale = declare(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1:], dtype)
        if not self.biased:
            return layer_norm(x, scale, jax.numpy.zeros_like(scale), self.eps)
        bias = declare(self, "bias", nn.initializers.zeros, ("norm",), x.shape[-1:], dtype)
        return layer_norm(x, scale, bias, self.eps)


class RMSNorm(nn.Module):
    """RMS normalisation, x / sqrt(mean(x^2) + eps) * scale over the last axis, statistics in float32 (Zhang & Sennrich 2019)."""

    eps: float
    compute: Compute
    zero_centred: bool = False
    """The stored scale is what is added to 1, as Gemma has it."""

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        initial = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
        scale = declare(self, "scale", initial, ("norm",), x.shape[-1:], self.compute.param_dtype)
        return rms_norm(x, 1.0 + scale.astype(jnp.float32) if self.zero_centred else scale, self.eps)


class Embed(nn.Module):
    """A table of vectors [V, D], looked up by integer id."""

    rows: int
    width: int
    names: AxisNames
    compute: Compute
    table_init: Initializer

    def setup(self) -> None:
        shape = (self.rows, self.width)
        self.embedding = declare(self, "embedding", self.table_init, self.names, shape, self.compute.param_dtype)

    def __call__(self, ids: Integer[Array | np.ndarray, "*rows"]) -> Float[Array, "*rows D"]:
        return look_up(self.embedding, ids, self.names, self.compute)
