"""Which numbers of a step were not finite: asked when a run gives up, at the cost of one more program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.errors import listed
from jaxft.parallel.sharding import jitted, replicated
from jaxft.training.setup import Setup
from jaxft.training.step import Batch, prepared
from jaxft.trees import Params, paths_of

_MOST = 3


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
