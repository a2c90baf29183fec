"""Which numbers of a step were not finite: asked when a run gives up, at the cost of one more program."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.config import MeshConfig
from jaxft.data.batch import HostBatch
from jaxft.errors import listed
from jaxft.parallel.sharding import jitted, make_mesh, replicated
from jaxft.training.replay import first_not_finite
from jaxft.training.setup import Setup
from jaxft.training.step import Batch, prepared
from jaxft.trees import Params, paths_of

_MOST = 3


class NotFinite(Exception):
    """Numbers of a run were not finite from step ``first`` to step ``last``; ``named``: the message says which."""

    def __init__(self, said: str, first: int, last: int, *, named: bool = False) -> None:
        super().__init__(said)
        self.first, self.last, self.named = first, last, named


def not_finite(setup: Setup, params: Params, batch: Batch, seed: int, step: int) -> str:
    """Names which of a step's loss, gradients and parameters are NaN or infinite; empty if everything is finite.

    Args:
      batch: that of the step, on the mesh.
      step: steps before it.
    """

    def look(params: Params, batch: Batch, seed: jax.Array, step: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        batch, key, weight = prepared(setup.task, batch, seed, step)
        gradient, sums = setup.gradient()(params, batch, key, weight)
        return sums["loss"], [jnp.isfinite(leaf).all() for leaf in gradient]

    program = jitted(look, setup.mesh, replicated(setup.mesh))
    with jax.set_mesh(setup.mesh):
        loss, finite = jax.device_get(program(params, batch, np.uint32(seed), np.int32(step)))
    frozen = paths_of(setup.frozen)
    trained = [path for path in paths_of(setup.shapes) if not frozen[path]]
    spoilt = [path for path, ok in zip(trained, finite, strict=True) if not ok]
    parts = [f"parameters {listed(bad, _MOST)} are not finite"] if (bad := not_finite_in(setup, params)) else []
    parts += [f"the loss is {float(loss)}"] if not np.isfinite(loss) else []
    parts += (
        [f"gradients of {len(spoilt)} of {len(trained)} tensors are not finite ({listed(spoilt, _MOST)})"]
        if spoilt
        else []
    )
    return ", ".join(parts)


def first_operation(setup: Setup, params: Params, batch: HostBatch, seed: int, step: int) -> str:
    """Names the first operation of a step that gave NaN or infinity from finite numbers.

    It is the first one, in the order of the program, whose numbers reach the loss; where the loss is finite, whose numbers reach a
    gradient (:mod:`jaxft.training.origins`). The step is computed on the mesh's first device, operation by operation: what only the
    compiled program rounds to infinity is not seen.

    Args:
      batch: that of the step, on the host.
      step: steps before it.
    """
    mesh = make_mesh(MeshConfig(), [setup.mesh.devices.flat[0]])
    alone = dataclasses.replace(setup, mesh=mesh)

    def computed(params: Params, batch: Batch, seed: jax.Array, step: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        batch, key, weight = prepared(setup.task, batch, seed, step)
        gradient, sums = alone.gradient()(params, batch, key, weight)
        return sums["loss"] / weight, gradient

    given = (jax.device_get(params), dict(batch), np.uint32(seed), np.int32(step))
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(computed)(*given)
    names = [f"parameter {path}" for path in paths_of(params)] + [
        f"field {name} of the batch" for name in sorted(batch)
    ]
    leaves = jax.tree.leaves(jax.device_put(given, replicated(mesh)))
    with jax.set_mesh(mesh):
        said = first_not_finite(program, dict(zip([*names, "the seed", "the step"], leaves, strict=True)))
    return said or "computed again, operation by operation, everything was finite"


def not_finite_in(setup: Setup, tree: Params) -> list[str]:
    """The paths of arrays that hold NaN or infinity."""
    paths = paths_of(tree)
    floats = {path: leaf for path, leaf in paths.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    with jax.set_mesh(setup.mesh):
        finite = jax.device_get(_all_finite(setup.mesh)(floats))
    return [path for path in floats if not finite[path]]


@functools.lru_cache(maxsize=4)
def _all_finite(mesh: Mesh) -> jax.stages.Wrapped:
    """Whether each of some arrays is finite; one program for all saves of a run."""

    def looked_through(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: jnp.isfinite(leaf).all() for path, leaf in leaves.items()}

    return jitted(looked_through, mesh, replicated(mesh))
