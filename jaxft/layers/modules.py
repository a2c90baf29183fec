"""Thin Linen modules: they declare parameters with their logical axes, and call functions.

Dims: D, E widths of inputs and outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import struct

from jaxft.layers.compute import Compute
from jaxft.layers.embedding import look_up
from jaxft.layers.functions import layer_norm, rms_norm
from jaxft.layers.matmul import affine
from jaxft.parallel.sharding import AxisNames

Array = jax.Array
Initializer = Callable[[Array, tuple[int, ...], Any], Array]


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


def declare(
    module: nn.Module, name: str, init: Initializer, names: AxisNames, shape: tuple[int, ...], dtype: Any
) -> Any:
    """A parameter of ``module``: :class:`Labelled` with its logical axis names, or, in a module of someone else's that ours is
    a part of, a plain array, as Linen's own layers make them."""
    return module.param(name, labelled(init, *names) if is_ours(module) else init, shape, dtype)


def is_ours(module: nn.Module) -> bool:
    """Whether the outermost module is one of this package, or the ``Model`` of a family from another one."""
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return hasattr(type(module), "facts") or type(module).__module__.partition(".")[0] == __name__.partition(".")[0]


def unlabel(tree: Any) -> tuple[Any, Any]:
    """A tree of :class:`Labelled` leaves as (tree of values, tree of their axis names)."""

    def is_label(leaf: Any) -> bool:
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
    def __call__(self, x: Any) -> Array:
        dtype = self.compute.param_dtype
        kernel = declare(self, "kernel", self.kernel_init, self.names, self.shape, dtype)
        kernel = self.compute.rules.place_gradient(kernel, *self.names)
        bias = None
        if self.biased:
            bias = declare(self, "bias", nn.initializers.zeros, self.names[1:], self.shape[1:], dtype)
        letters = "ab"[: (x[0] if isinstance(x, tuple) else x).ndim - 1]
        return affine(f"{letters}d,de->{letters}e", x, kernel, bias, self.compute, self.act, self.names)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, statistics in float32 (Ba et al. 2016)."""

    eps: float
    compute: Compute
    biased: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.compute.param_dtype
        scale = declare(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1:], dtype)
        if not self.biased:
            return layer_norm(x, scale, jax.numpy.zeros_like(scale), self.eps)
        bias = declare(self, "bias", nn.initializers.zeros, ("norm",), x.shape[-1:], dtype)
        return layer_norm(x, scale, bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, statistics in float32 (Zhang & Sennrich 2019)."""

    eps: float
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.compute.param_dtype
        scale = declare(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1:], dtype)
        return rms_norm(x, scale, self.eps)


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

    def __call__(self, ids: Array) -> Array:
        return look_up(self.embedding, ids, self.names, self.compute)
