"""Adafactor (Shazeer and Stern 2018) on layer-stacked parameters.

optax has Adafactor, but it factors over the two largest dimensions of an array and clips by the RMS of the whole array.
On a stack of layers both mix layers, and a query kernel [L, D, N, H] would be factored over D and H, or not at all.
Here each layer is treated as the matrix that it is, so a stack trains exactly as its layers would apart.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxft.trees import Leaf, Params, map_paths, of_layers

_SQUARE_EPS = 1e-30
"""Epsilon 1 of the paper."""
_DECAY_EXPONENT = 0.8
"""The second moment at update t (from 1) forgets at rate 1 - t^-0.8 (section 7.2 of the paper)."""
_CLIP_RMS = 1.0
"""Update clipping threshold d (section 6 of the paper)."""


class FactoredState(NamedTuple):
    """Second moments.

    All keep the rank of the parameter; dimensions that are averaged out, and all dimensions of what a parameter does
    not need, have size 1.
    """

    count: jax.Array
    v_row: optax.Params
    """Mean over the output dimensions, for matrices."""
    v_col: optax.Params
    """Mean over the input dimensions, for matrices."""
    v: optax.Params
    """Full second moment, for all others."""


class _Result(NamedTuple):
    update: jax.Array
    v_row: jax.Array
    v_col: jax.Array
    v: jax.Array


def scale_by_adafactor(leaves: dict[str, Leaf]) -> optax.GradientTransformation:
    """Gradient over the root of its factored second moment, clipped to RMS 1 per layer.

    Neither momentum nor scaling by the RMS of the parameters: with an absolute rate ``learning_rate`` means the same as
    for the other optimizers. The Trainer of transformers uses its Adafactor in this way too.
    """

    def init(params: optax.Params) -> FactoredState:
        def zeros(kind: str) -> Params:
            return map_paths(lambda path, p: jnp.zeros(_moment_shape(leaves[path], kind), p.dtype), params)

        return FactoredState(jnp.zeros([], jnp.int32), zeros("v_row"), zeros("v_col"), zeros("v"))

    def update(
        updates: optax.Updates, state: PyTree, params: optax.Params | None = None
    ) -> tuple[optax.Updates, FactoredState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        keep = 1.0 - count.astype(jnp.float32) ** -_DECAY_EXPONENT
        results = map_paths(
            lambda path, g, row, col, v: _update(leaves[path], keep, g, row, col, v),
            updates, state.v_row, state.v_col, state.v,
        )  # fmt: skip

        def part(index: int) -> Params:
            return jax.tree.map(lambda r: r[index], results, is_leaf=lambda r: isinstance(r, _Result))

        return part(0), FactoredState(count, part(1), part(2), part(3))

    return optax.GradientTransformation(init, update)


def _moment_shape(leaf: Leaf, kind: str) -> tuple[int, ...]:
    if leaf.matrix is None:
        return leaf.shape if kind == "v" else (1,) * len(leaf.shape)
    rows, columns = leaf.matrix
    averaged = {"v_row": columns, "v_col": rows, "v": tuple(range(len(leaf.shape)))}[kind]
    return tuple(1 if i in averaged else size for i, size in enumerate(leaf.shape))


def _update(leaf: Leaf, keep: jax.Array, grad: jax.Array, row: jax.Array, col: jax.Array, v: jax.Array) -> _Result:
    square = jnp.square(grad) + _SQUARE_EPS
    if leaf.matrix is None:
        v = keep * v + (1 - keep) * square
        update = grad * jax.lax.rsqrt(v)
    else:
        rows, columns = leaf.matrix
        row = keep * row + (1 - keep) * jnp.mean(square, columns, keepdims=True)
        col = keep * col + (1 - keep) * jnp.mean(square, rows, keepdims=True)
        update = grad * jax.lax.rsqrt(row / jnp.mean(row, rows, keepdims=True)) * jax.lax.rsqrt(col)
    within = tuple(i for i, name in enumerate(leaf.axes) if not of_layers(name) and name != "experts")
    rms = jnp.sqrt(jnp.mean(jnp.square(update), within, keepdims=True))
    return _Result(update / jnp.maximum(1.0, rms / _CLIP_RMS), row, col, v)
