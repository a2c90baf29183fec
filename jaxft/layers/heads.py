"""Affine maps to the heads of attention and back.

Products are of matrices: XLA scatters the gradient of a matrix over devices as it is summed up, one of more dimensions was seen
to be summed up whole on each first.

Attention kernels that hold tokens on the last axis (:func:`jaxft.attention.tokens_last`) get them from products that end in
[features, tokens], without a pass over memory that turns them: matrix units multiply either way at one speed.

Dims: B batch, S length, T = B S tokens, D model width, N heads, H head size, E = N H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.layers.compute import Compute
from jaxft.layers.matmul import affine
from jaxft.layers.modules import Initializer, declare
from jaxft.layers.stacks import unstack
from jaxft.parallel.sharding import AxisNames

Array = jax.Array


class Projection(nn.Module):
    """Kernel [D, N, H] and bias [N, H] or None of an affine map to heads: what :func:`project` takes."""

    shape: tuple[int, int, int]
    names: AxisNames
    compute: Compute
    kernel_init: Initializer
    biased: bool = True

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        dtype = self.compute.param_dtype
        kernel = declare(self, "kernel", self.kernel_init, self.names, self.shape, dtype)
        if not self.biased:
            return kernel, None
        return kernel, declare(self, "bias", nn.initializers.zeros, self.names[1:], self.shape[1:], dtype)


def project(
    x: Array, projection: tuple[Array, Array | None], names: AxisNames, compute: Compute, tokens_last: bool
) -> Array:
    """``x`` [B, S, D] mapped to heads: [B, N, S, H], or [N, H, T] with ``tokens_last``.

    Args:
      projection: of a :class:`Projection`. names: logical axes of its kernel.
    """
    kernel, bias = projection
    weight, matrix = _matrix(kernel, 1, names, compute)
    bias = None if bias is None else bias.reshape(-1)
    if tokens_last:
        y = affine("td,de->et", x.reshape(-1, x.shape[-1]), matrix, bias, compute, weight=weight)
        return y.reshape(*kernel.shape[1:], -1)
    y = affine("bsd,de->bse", x, matrix, bias, compute, weight=weight)
    return y.reshape(*y.shape[:-1], *kernel.shape[1:]).transpose(0, 2, 1, 3)


def rows_of(x: Array, rows: int) -> Array:
    """[N, H, T] as [B, N, S, H]; B is ``rows``. Kernels that want the former undo it, and compilers see that."""
    n, h, t = x.shape
    flat = jax.lax.optimization_barrier(x.reshape(n * h, t))
    return flat.reshape(n, h, rows, -1).transpose(2, 0, 3, 1)


def project_together(
    x: Array,
    projections: Sequence[tuple[Array, Array | None]],
    names: AxisNames,
    compute: Compute,
    tokens_last: bool = False,
) -> tuple[Array, ...]:
    """``x`` [B, S, D] through several projections of one shape, biased or not; each result is [B, N, S, H].

    As a single wide product: the stored tree keeps them apart, three narrow products were measured slower on CPUs. Of each head, all
    projections lie side by side: heads may be split over devices. With ``tokens_last``, as products of their own: parts of a
    wide one would have to be copied out of it.

    Args:
      names: logical axes of the kernels.
    """
    if tokens_last:
        return tuple(rows_of(project(x, each, names, compute, True), x.shape[0]) for each in projections)
    kernel = jnp.stack([kernel for kernel, _ in projections], axis=2)
    biases = [bias for _, bias in projections if bias is not None]
    bias = jnp.stack(biases, axis=1).reshape(-1) if biases else None
    weight, matrix = _matrix(kernel, 1, names, compute)
    y = affine("bsd,de->bse", x, matrix, bias, compute, weight=weight)
    y = y.reshape(*y.shape[:-1], *kernel.shape[1:])
    return unstack(len(projections), y.transpose(3, 0, 2, 1, 4))


def project_exactly(x: Array, projections: Mapping[str, Array], layer: int) -> Array:
    """``x`` [B, S, D] mapped to heads [B, N, S, H] in full float32, from the stacked parameters of a :class:`Projection`."""
    one = {name: stacked[layer].astype(jnp.float32) for name, stacked in projections.items()}
    y = jnp.einsum("bsd,dnh->bnsh", x.astype(jnp.float32), one["kernel"], precision="highest")
    return y + one["bias"][:, None] if "bias" in one else y


class FromHeads(nn.Module):
    """The affine map from heads [B, N, S, H] to [B, S, D], with kernel [N, H, D] and bias [D]."""

    shape: tuple[int, int, int]
    names: AxisNames
    compute: Compute
    kernel_init: Initializer
    biased: bool = True

    @nn.compact
    def __call__(self, x: Array, tokens_last: bool = False) -> Array:
        dtype, (b, n, s, h) = self.compute.param_dtype, x.shape
        kernel = declare(self, "kernel", self.kernel_init, self.names, self.shape, dtype)
        bias = None
        if self.biased:
            bias = declare(self, "bias", nn.initializers.zeros, self.names[2:], self.shape[2:], dtype)
        weight, matrix = _matrix(kernel, 2, self.names, self.compute)
        if tokens_last:
            flat = jax.lax.optimization_barrier(x.transpose(1, 3, 0, 2).reshape(n * h, b * s))
            return affine("et,ed->td", flat, matrix, bias, self.compute, weight=weight).reshape(b, s, -1)
        merged = x.transpose(0, 2, 1, 3).reshape(b, s, n * h)
        return affine("bse,ed->bsd", merged, matrix, bias, self.compute, weight=weight)


def _matrix(kernel: Array, inputs: int, names: AxisNames, compute: Compute) -> tuple[AxisNames, Array]:
    """A kernel with its first ``inputs`` dimensions as rows and the rest as columns; of each, the first may be split."""
    weight = (names[0], names[inputs])
    matrix = kernel.reshape(math.prod(kernel.shape[:inputs]), -1)
    return weight, compute.rules.place_gradient(matrix, *weight)
