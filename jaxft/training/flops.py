"""How many floating-point operations a step is worth: those of its matrix products, counted in the model as traced.

What is counted is useful work, whatever a program does besides: three times the forward pass (each product has two in the
backward pass), nothing for what is computed again, half of a decoder's attention (the other half is masked), what the windows of
local layers show, nothing for padding. MFU is this, over time and peak (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import jax
import jax.extend as jex

from jaxft.data.batch import Shape
from jaxft.models.initial import initialisable
from jaxft.parallel.sharding import no_mesh
from jaxft.training.recipe import Recipe
from jaxft.training.step import Batch, forward_of, prepared_at
from jaxft.trees import Params


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one training step on a batch without padding."""

    dense: float
    """FLOPs of products with parameters, in proportion to the tokens."""
    attention: float
    """FLOPs of products between tokens, in proportion to the square of the length."""

    @property
    def total(self) -> float:
        """FLOPs of all products."""
        return self.dense + self.attention


def model_flops(recipe: Recipe, shape: Shape) -> ModelFlops:
    """What a step on a batch of a shape is worth."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    model = initialisable(recipe.model)  # whose attention is products that can be seen; those of a kernel cannot

    def forward(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        batch = prepared_at(recipe.task, batch, key, 0)
        return recipe.task.sums(forward_of(model, params), batch, None)["loss"]

    with no_mesh():
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), recipe.batch(shape))
        traced = jax.make_jaxpr(forward)(recipe.shapes, shapes, key)
    dense, attention = _counted(traced.jaxpr)
    seen, whole, sizes = 0.0, 0.0, dict(shape.sizes)
    stacks = recipe.model.facts.stacks
    fixed = {stack.axis: stack.tokens for stack in stacks if stack.tokens is not None}
    lengths = {**sizes, **fixed}  # of images and sounds: as many in every row
    # Of stacks of several kinds, each counts by what its layers would cost if all was seen.
    for stack in stacks:
        length, cost = lengths.get(stack.axis, 1), stack.layers * stack.heads * stack.head_size
        beside = 0 if stack.looks_at is None else lengths.get(stack.looks_at, 1) * length
        seen += cost * (length**2 * stack.seen(length) + beside)
        whole += cost * (length**2 + beside)
    share = seen / whole
    return ModelFlops(3 * dense, 3 * attention * share)


class UsefulFlops:
    """Useful FLOPs of steps as they come, padding left out."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._known: dict[Shape, ModelFlops] = {}

    def of(self, shape: Shape, tokens: int) -> float:
        """FLOPs of a step on a batch of a shape with so many real tokens.

        Attention is taken to shrink with the square of the share of real tokens: exact for rows of one length, too little
        for others and for packed rows, whose padding is none.
        """
        if shape not in self._known:
            self._known[shape] = model_flops(self._recipe, shape)
        whole, share = self._known[shape], tokens / shape.tokens
        return share * whole.dense + share**2 * whole.attention


def _counted(jaxpr: jex.core.Jaxpr) -> tuple[float, float]:
    """(products with one operand shared by all rows, products with batch dimensions)."""
    dense = attention = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, out = (cast(jax.core.ShapedArray, var.aval) for var in (equation.invars[0], equation.outvars[0]))
            flops = 2.0 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
            if batched:
                attention += flops
            else:
                dense += flops
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        parts = [_counted(inner) for inner in _inside(equation)]
        if parts:
            # Of alternatives (one per platform, the branches of a conditional), the dearest.
            most = max(parts, key=sum)
            dense, attention = dense + times * most[0], attention + times * most[1]
    return dense, attention


def _inside(equation: jex.core.JaxprEqn) -> list[jex.core.Jaxpr]:
    """The programs that an equation calls."""
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found
