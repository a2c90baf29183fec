"""The training state: everything that a step reads and writes, as one tree of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxft.parallel.sharding import replicated
from jaxft.training.optim import init_ema, map_state
from jaxft.training.spikes import Recent, no_steps
from jaxft.trees import Params, Shardings, Tree

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState(Generic[T]):
    """The state of training; a checkpoint holds exactly this. Of arrays, or of their shapes or shardings."""

    step: T
    """int32: steps taken, the position in the data."""
    skipped: T
    """int32: how many of them changed nothing because loss or gradient was not finite."""
    streak: T
    """int32: how many of the latest were skipped in a row."""
    params: Tree[T]
    opt_state: PyTree[T]
    ema: Tree[T] | None
    """Moving average of ``params``, or None."""
    recent: Recent[T] | None = None
    """What ``train.spike_skip`` judges steps by; None where it is off."""

    @property
    def best_params(self) -> Tree[T]:
        """What evaluation and export use: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    params: Params, optimizer: optax.GradientTransformation, ema: bool, spike_skip: bool = False
) -> TrainState[jax.Array]:
    """The state before step 0. Traceable, for :func:`jax.eval_shape` and sharded initialisation.

    Args:
      ema, spike_skip: whether there is a moving average of the parameters, and what steps that stand out are known by.
    """

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    average = init_ema(params) if ema else None
    recent = no_steps() if spike_skip else None
    return TrainState(zero(), zero(), zero(), params, optimizer.init(params), average, recent)


def state_shardings(
    state: TrainState[jax.ShapeDtypeStruct], optimizer: optax.GradientTransformation, params: Shardings, mesh: Mesh
) -> TrainState[NamedSharding]:
    """Shardings of a (shaped) state, given those of its parameters: what mirrors a parameter lies where it lies, the rest
    (counters) is replicated.

    Args:
      state: of arrays or shapes.
      params: tree of :class:`NamedSharding` like ``state.params``.
    """
    whole = replicated(mesh)

    def like_param(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        # Adafactor's statistics have size 1 where they are averaged over a dimension.
        spec = (None if size == 1 else axes for size, axes in zip(leaf.shape, sharding.spec, strict=True))
        return NamedSharding(mesh, PartitionSpec(*spec))

    opt_state = map_state(optimizer, like_param, state.opt_state, params, other=lambda _: whole)
    recent = jax.tree.map(lambda _: whole, state.recent)
    return TrainState(whole, whole, whole, params, opt_state, None if state.ema is None else params, recent)
