"""Thin Linen modules: they declare parameters with their logical axes, and call functions.

Dims: B batch, S query length, D model width, N heads, H head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jaxft.layers.compute import Compute
from jaxft.layers.embedding import look_up
from jaxft.layers.functions import layer_norm, rms_norm
from jaxft.layers.matmul import affine
from jaxft.layers.stacks import unstack
from jaxft.sharding import AxisNames

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


def unlabel(tree: Any) -> tuple[Any, Any]:
    """A tree of :class:`Labelled` leaves as (tree of values, tree of their axis names)."""

    def is_label(leaf: Any) -> bool:
        return isinstance(leaf, Labelled)

    return (
        jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=is_label),
        jax.tree.map(lambda leaf: leaf.names, tree, is_leaf=is_label),
    )


class Linear(nn.Module):
    """An affine map of the last ``inputs`` dimensions of its input, for instance with kernel [D, N, H] and bias [N, H].

    The product is one of matrices: XLA scatters the gradient of a matrix over devices as it is summed up, one of more
    dimensions was seen to be summed up whole on each first.
    """

    shape: tuple[int, ...]
    names: AxisNames
    compute: Compute
    kernel_init: Initializer
    inputs: int = 1
    """Leading kernel dimensions that are summed over."""
    act: Callable[[Any], Array] | None = None
    """Applied to the input, see :func:`affine`."""
    biased: bool = True

    @nn.compact
    def __call__(self, x: Any) -> Array:
        dtype = self.compute.param_dtype
        outputs, names = self.shape[self.inputs :], self.names[self.inputs :]
        kernel = self.param("kernel", labelled(self.kernel_init, *self.names), self.shape, dtype)
        weight = (
            self.names[0],
            self.names[self.inputs],
        )  # of the matrix; of several dimensions, the first may be split
        kernel = as_matrix(kernel, self.inputs, weight, self.compute)
        bias = None
        if self.biased:
            bias = self.param("bias", labelled(nn.initializers.zeros, *names), outputs, dtype).reshape(-1)
        if self.inputs > 1:
            x = x.reshape(*x.shape[: -self.inputs], -1)
        letters = "ab"[: (x[0] if isinstance(x, tuple) else x).ndim - 1]
        y = affine(f"{letters}d,de->{letters}e", x, kernel, bias, self.compute, self.act, weight)
        return y.reshape(*y.shape[:-1], *outputs)


def as_matrix(kernel: Array, inputs: int, names: AxisNames, compute: Compute) -> Array:
    """A kernel with its first ``inputs`` dimensions as rows and the rest as columns; ``names``: of the two."""
    return compute.rules.place_gradient(kernel.reshape(math.prod(kernel.shape[:inputs]), -1), *names)


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


def project_together(
    x: Array, projections: Sequence[tuple[Array, Array]], names: AxisNames, compute: Compute
) -> tuple[Array, ...]:
    """``x`` [B, S, D] through several projections of one shape as a single wide product; each result is [B, N, S, H].

    The stored tree keeps them apart; three narrow products were measured slower than one wide one. Of each head, all
    projections lie side by side: heads may be split over devices.

    Args:
      names: logical axes of the kernels.
    """
    kernels, biases = zip(*projections, strict=True)
    kernel, bias = jnp.stack(kernels, axis=2), jnp.stack(biases, axis=1)
    weight = (names[0], names[1])
    matrix = as_matrix(kernel, 1, weight, compute)
    y = affine("bsd,de->bse", x, matrix, bias.reshape(-1), compute, weight=weight)
    y = y.reshape(*y.shape[:-1], *bias.shape)
    return unstack(len(projections), y.transpose(3, 0, 2, 1, 4))


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


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, statistics in float32 (Zhang & Sennrich 2019)."""

    eps: float
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.compute.param_dtype
        scale = self.param("scale", labelled(nn.initializers.ones, "norm"), x.shape[-1:], dtype)
        return rms_norm(x, scale, self.eps)


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
        return look_up(self.embedding, ids, self.names, self.compute)
