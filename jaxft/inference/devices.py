"""Where a model that answers lies: on one device, or spread over a mesh that was asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxft.config import load_config
from jaxft.data.batch import Fields, HostBatch
from jaxft.data.loader import to_global
from jaxft.errors import UserError
from jaxft.models.contract import Model
from jaxft.models.initial import shapes_and_axes
from jaxft.parallel.sharding import (
    DEFAULT_RULES,
    AxisRules,
    jitted,
    make_mesh,
    make_rules,
    replicated,
    shardings_of,
    ways,
)

R = TypeVar("R")


@dataclass(frozen=True)
class Devices:
    """One device (no mesh), or the devices of a mesh."""

    mesh: Mesh | None = None
    rules: AxisRules = DEFAULT_RULES

    @property
    def batch_ways(self) -> int:
        """Into how many parts a batch is split."""
        return 1 if self.mesh is None else ways(self.mesh, self.rules, "batch")

    def check_batch(self, key: str, size: int) -> None:
        """Raises UserError if a batch of this size cannot be split over the devices; ``key`` is what says the size."""
        if size % self.batch_ways:
            raise UserError(
                f"{key}={size} cannot be split {self.batch_ways} ways (mesh slices x data x fsdp); choose a multiple"
            )

    def spread(self, model: Model, params: PyTree[Array]) -> PyTree[Array]:
        """Parameters, each in the parts that the devices hold; those that lie in a file are read one after the other."""
        if self.mesh is None:
            return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
        places = shardings_of(self.mesh, self.rules, *shapes_and_axes(model))
        return jax.tree.map(lambda leaf, place: jax.device_put(np.asarray(leaf), place), params, places)

    def compiled(
        self, function: Callable[[PyTree[Array], dict[str, Array]], R], fields: Fields
    ) -> Callable[[PyTree[Array], HostBatch], R]:
        """``function(params, batch)``, compiled once per shape of a batch of the host; results lie whole on each device."""
        if self.mesh is None:
            return jax.jit(function)
        mesh, program = self.mesh, jitted(function, self.mesh, replicated(self.mesh))

        @functools.wraps(function)
        def run(params: PyTree[Array], batch: HostBatch) -> R:
            rows = len(batch["weights"])
            with jax.set_mesh(mesh):
                return program(params, to_global(batch, fields, mesh, self.rules, rows))

        return run


def devices_asked_for(overrides: Sequence[str]) -> Devices:
    """The mesh that ``mesh.*`` overrides ask for; without any, one device: the mesh of a model's training is not needed to answer.

    Raises:
      UserError: there are not the devices for it.
    """
    asked = [override for override in overrides if override.startswith("mesh.")]
    if not asked:
        return Devices()
    config = load_config(None, asked).mesh
    return Devices(make_mesh(config), make_rules(config))
