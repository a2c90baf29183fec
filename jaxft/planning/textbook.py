"""What a layout has to send, by the formulas of textbooks: to check compiled programs against, and where nothing compiles.

Of one step and one device, in bytes on the wire of ring algorithms. For a weight split n ways: gathered before the forward
pass and again before the backward pass, its gradient scattered ((n - 1) / n of the weight each; Rajbhandari et al. 2020). A
gradient that batch axes do not split: all-reduced over them (2 (n - 1) / n). Tensor parallelism: one all-reduce of the
activations per half layer and direction (Shoeybi et al. 2019). Context: keys and values around the ring, and back with
their gradients (Liu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jaxft.models.contract import Stack
from jaxft.parallel.sharding import CONTEXT, ways
from jaxft.training.recipe import Recipe
from jaxft.trees import paths_of


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one step, by cause."""

    weights_gathered: float
    gradients_scattered: float
    gradients_reduced: float
    tensor_parallel: float
    context_ring: float

    @property
    def total(self) -> float:
        """Sum of the kinds."""
        return sum(self.__dict__.values())


def traffic_of(recipe: Recipe, rows: int, length: int) -> Traffic:
    """The textbook's traffic of a step on ``rows`` x ``length`` tokens; weights are gathered in the type of matmul operands."""
    mesh, rules, compute = recipe.mesh, recipe.model.compute.rules, recipe.model.compute
    operand = np.dtype(compute.matmul_dtype).itemsize
    micro = recipe.config.train.accumulation
    batch_axes = {axis for axis in (*dict(rules.table)["batch"], *dict(rules.table)["length"]) if mesh.shape[axis] > 1}
    gathered = scattered = reduced = 0.0
    trees = (recipe.shapes, recipe.shardings, recipe.frozen)
    for path, leaf, place, stays in zip(paths_of(recipe.shapes), *map(jax.tree.leaves, trees), strict=True):
        used = {axis for entry in place.spec if entry for axis in ([entry] if isinstance(entry, str) else entry)}
        by_batch = int(np.prod([mesh.shape[axis] for axis in used & batch_axes]))
        rest = int(np.prod([mesh.shape[axis] for axis in batch_axes - used]))
        whole = _uses(recipe, path) * leaf.size / int(np.prod([mesh.shape[axis] for axis in used - batch_axes]))
        share = (by_batch - 1) / by_batch
        gathered += 2 * micro * share * whole * operand
        if stays:
            continue
        summed = np.dtype(compute.gradient_dtype or leaf.dtype if leaf.ndim > 1 else leaf.dtype).itemsize
        scattered += micro * share * whole * summed
        reduced += 2 * (rest - 1) / rest * whole / by_batch * summed
    return Traffic(gathered, scattered, reduced, _of_tensor(recipe, rows, length), _of_context(recipe, rows, length))


def _uses(recipe: Recipe, path: str) -> float:
    """At how many places of the network a parameter is used: layers may share theirs."""
    stacks = recipe.model.facts.stacks
    return next((stack.layers / stack.own for stack in stacks if f"/{stack.path}/" in f"/{path}"), 1.0)


def _local_tokens(recipe: Recipe, rows: int, length: int) -> float:
    rules = recipe.model.compute.rules
    return rows * length / ways(recipe.mesh, rules, "batch") / ways(recipe.mesh, rules, "length")


def _tokens_of(recipe: Recipe, rows: int, length: int, stack: Stack) -> float:
    """Tokens per device that go through a stack."""
    rules, sizes = recipe.model.compute.rules, dict(recipe.shape(rows, length).sizes)
    count = sizes.get(stack.axis, 1) if stack.tokens is None else stack.tokens
    return rows * count / ways(recipe.mesh, rules, "batch") / ways(recipe.mesh, rules, stack.axis)


def _of_tensor(recipe: Recipe, rows: int, length: int) -> float:
    n, compute = ways(recipe.mesh, recipe.model.compute.rules, "act_mlp"), recipe.model.compute
    activation = np.dtype(compute.activation_dtype).itemsize
    tokens = _local_tokens(recipe, rows, length)
    sent, width = 0.0, 0
    for stack in recipe.model.facts.stacks:
        # Two per layer forwards, two backwards; three where it looks at another stack besides.
        sent += (4 if stack.looks_at is None else 6) * stack.layers * _tokens_of(recipe, rows, length, stack)
        width = stack.width
    if ways(recipe.mesh, compute.rules, "vocab") > 1:
        # Looked up in the part of the table that each device has, and the gradient of the logits' input.
        sent += tokens + _predicted(recipe, rows, length)
    return 2 * (n - 1) / n * sent * width * activation


def _predicted(recipe: Recipe, rows: int, length: int) -> float:
    """Tokens per device that meet the vocabulary."""
    prepared = jax.eval_shape(
        recipe.task.prepare, recipe.batch(recipe.shape(rows, length)), jax.eval_shape(lambda: jax.random.key(0))
    )
    local = _local_tokens(recipe, rows, length) / (rows * length)
    return prepared["targets"].size * local if "targets" in prepared else 0.0


def _of_context(recipe: Recipe, rows: int, length: int) -> float:
    n, compute = recipe.mesh.shape[CONTEXT], recipe.model.compute
    kept = np.dtype(compute.activation_dtype).itemsize
    one = 0.0
    for stack in recipe.model.facts.stacks:
        width = stack.key_heads * stack.head_size / ways(recipe.mesh, compute.rules, "act_kv_heads")
        split = ways(recipe.mesh, compute.rules, stack.axis) > 1
        one += stack.layers * _tokens_of(recipe, rows, length, stack) * width if split else 0.0
    # Keys and values in n - 1 rounds, twice; their float32 gradients in n.
    return 2 * one * (2 * (n - 1) * kept + (n * 4 if n > 1 else 0))


def activation_bytes(recipe: Recipe, rows: int, length: int) -> float:
    """What the backward pass keeps of the forward pass, per device: from the shapes of the traced gradient. An estimate: as
    if nothing of it were split over ``tensor``."""
    from jaxft.parallel.sharding import no_mesh
    from jaxft.training.step import forward_of, prepared_at

    key = jax.eval_shape(lambda: jax.random.key(0))

    def kept(params: PyTree[jax.Array], batch: dict[str, jax.Array], key: PRNGKeyArray) -> Callable[..., object]:
        batch = prepared_at(recipe.task, batch, key, 0)
        return jax.vjp(lambda p: recipe.task.sums(forward_of(recipe.model, p), batch, key)["loss"], params)[1]

    def size(count: int) -> int:
        batch = recipe.batch(recipe.shape(count, length))
        shaped = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in batch.items()}
        leaves = jax.tree.leaves(jax.eval_shape(kept, recipe.shapes, shaped, key))
        return sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in leaves
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        )

    # Weights are kept too, whatever the batch: only the growth per row counts.
    with no_mesh():
        per_row = size(2) - size(1)
    rules = recipe.model.compute.rules
    local = rows / ways(recipe.mesh, rules, "batch") / ways(recipe.mesh, rules, "length")
    return per_row * local / recipe.config.train.accumulation
