"""Parameters before anything is read: their shapes and axes, and fresh values."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from jaxft.errors import UserError
from jaxft.layers import unlabel
from jaxft.models.checks import check_parameters
from jaxft.models.contract import Model
from jaxft.models.example import smallest_batch, smallest_shapes
from jaxft.parallel.sharding import no_mesh
from jaxft.trees import Axes, Params, Shapes, Shardings, paths_of

M = TypeVar("M", bound=Model)


def shapes_and_axes(model: Model) -> tuple[Shapes, Axes]:
    """The shaped parameter tree of a model, and the tree of its logical axis names; nothing is computed.

    Raises:
      UserError: it would have more parameters than any model.
    """
    try:
        hash(model)
    except TypeError:  # someone's own, with settings that change
        return _traced(model)
    shapes, axes = _remembered(model)
    return _copied(shapes), _copied(axes)


def _copied(tree: PyTree) -> PyTree:
    """The caller's own dicts, of the same leaves."""
    return {name: _copied(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


def _traced(model: Model) -> tuple[Shapes, Axes]:
    example = smallest_shapes(model.facts)
    # The tree does not depend on how layers are computed; scanned, it is traced once instead of once per layer.
    quick = initialisable(model, layers="scanned")
    with no_mesh():  # the example is too small to be split
        made = jax.eval_shape(lambda key, batch: quick.init(key, **batch)["params"], jax.random.key(0), example)
        shapes, axes = unlabel(made)
    check_parameters(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
    return shapes, axes


# One command asks several times, and tracing takes a fifth of a second.
_remembered = functools.lru_cache(maxsize=64)(_traced)


def check_fits(params: PyTree, model: Model, where: object) -> None:
    """Raises UserError if arrays are not those of the model that a checkpoint (``where``) says they are of."""
    found = {path: tuple(leaf.shape) for path, leaf in paths_of(params).items()}
    wanted = {path: tuple(leaf.shape) for path, leaf in paths_of(shapes_and_axes(model)[0]).items()}
    differing = [path for path in sorted(found.keys() | wanted.keys()) if found.get(path) != wanted.get(path)]
    if differing:
        have, want = (shapes.get(differing[0], "not there") for shapes in (found, wanted))
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise UserError(
            f"{where}: this checkpoint's arrays are not those of the model that it says it holds: {differing[0]} is {have}, and "
            f"would be {want}{more}"
        )


def init_params(model: Model, seed: int, shardings: Shardings | None = None) -> Params:
    """Freshly initialised parameters, made where they will lie."""
    # The model is a static argument, not part of a new function: other seeds find the compiled program.
    return jax.jit(_init, static_argnums=0, out_shardings=shardings)(model, jax.random.key(seed))


def initialisable(model: M, layers: Literal["unrolled", "scanned"] | None = None) -> M:
    """The model as it can be initialised: the attention backend asked for may refuse the tiny example."""
    how = model.compute if layers is None else dataclasses.replace(model.compute, layers=layers)
    return model.clone(compute=dataclasses.replace(how, attention="xla"))


def _init(model: Model, key: jax.Array) -> Params:
    with no_mesh():  # the example is too small to be split
        return unlabel(initialisable(model).init(key, **smallest_batch(model.facts))["params"])[0]


def spread(value: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has made, as one array over the devices of all."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def init_some(model: Model, wanted: tuple[str, ...], key: jax.Array) -> dict[str, jax.Array]:
    """Freshly initialised parameters of some paths; under jit, the rest of the initialisation is not computed."""
    return {path: value for path, value in paths_of(_init(model, key)).items() if path in wanted}
