"""The last layers of pretrained weights, drawn afresh (Zhang et al. 2020, arXiv 2006.05987): what they have learnt is of the task
that they were pretrained for, and may be a worse start than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import jax
from jax.sharding import Mesh

from jaxft.errors import UserError
from jaxft.models.contract import Model, Stack
from jaxft.models.initial import init_some, shapes_and_axes, spread
from jaxft.parallel.sharding import jitted
from jaxft.trees import Params, leaves_of, map_paths, paths_of

_POOLER = "pooler/"


def redrawn_rows(model: Model, count: int) -> dict[str, int]:
    """By path, how many rows of its stack, from the end, are drawn afresh: those of the last ``count`` layers of every stack; of the
    pooler, if there is one, the whole parameter (0).

    Raises:
      UserError: there are fewer layers, or layers share their parameters.
    """
    leaves, found = leaves_of(*shapes_and_axes(model)), dict[str, int]()
    for stack in model.facts.stacks:
        _check(stack, count)
        of_stack = [leaf for path, leaf in leaves.items() if path.startswith(f"{stack.path}/")]
        # Where the first layers lack a parameter, its rows are those of the others.
        found |= {leaf.path: min(count, leaf.layers) for leaf in of_stack if leaf.layers is not None}
    return found | {path: 0 for path in leaves if path.startswith(_POOLER)}


def _check(stack: Stack, count: int) -> None:
    if stack.own != stack.layers:
        raise UserError(
            f"model.reinit_layers={count}: the {stack.layers} layers of this model share the parameters of {stack.own}, "
            "so that the last ones cannot be drawn by themselves; leave it out"
        )
    if count > stack.layers:
        raise UserError(f"model.reinit_layers={count}: the model has {stack.layers} layers; give at most that many")


def redrawn(model: Model, params: Params, rows: Mapping[str, int], seed: int, mesh: Mesh) -> Params:
    """The parameters with those of :func:`redrawn_rows` drawn afresh as the model itself begins them, where they lie."""
    tops = jax.jit(_tops, static_argnums=(0, 1))(model, tuple(rows.items()), jax.random.key(seed))
    old = {path: leaf for path, leaf in paths_of(params).items() if path in tops}
    places = {path: leaf.sharding for path, leaf in old.items()}
    with jax.set_mesh(mesh):
        made = jitted(_joined, mesh, places)(old, {path: spread(top, places[path]) for path, top in tops.items()})
    found = cast("dict[str, jax.Array]", made)
    return map_paths(lambda path, leaf: found.get(path, leaf), params)


def _joined(old: dict[str, jax.Array], tops: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: leaf.at[-len(tops[path]) :].set(tops[path]) for path, leaf in old.items()}


def _tops(model: Model, rows: tuple[tuple[str, int], ...], key: jax.Array) -> dict[str, jax.Array]:
    made, counts = init_some(model, tuple(path for path, _ in rows), key), dict(rows)
    return {path: value[-counts[path] :] if counts[path] else value for path, value in made.items()}


def said(model: Model, rows: Mapping[str, int], count: int) -> str:
    """A line that tells which parameters are drawn afresh."""
    parts = [
        f"layers {stack.layers - count}..{stack.layers - 1} of {stack.layers} ({stack.path})"
        for stack in model.facts.stacks
    ]
    pooler = ["the pooler"] if any(path.startswith(_POOLER) for path in rows) else []
    return f"drawn afresh (model.reinit_layers={count}): {', '.join([*parts, *pooler])}"
