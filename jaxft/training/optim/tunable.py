"""Settings that a compiled train step can take as arguments: runs that differ in nothing else share one program.

Whatever the schedule depends on (rate, warm-up, shape, length of the run) comes as a table with the rate of each update. The state
of the optimizer is the same with arguments as with constants, but for the place of weight decay where that is 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxft.layers import RunTimeRate, run_time_rate
from jaxft.training.optim.schedules import Schedule, make_schedule

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from jaxft.config import OptimConfig

T = TypeVar("T")
_NONE: Mapping[str, float] = MappingProxyType({})

SCHEDULE_KEYS = (
    *("learning_rate", "schedule", "warmup_steps", "warmup_fraction", "end_factor", "power", "step_fractions"),
    *("step_factor", "exponential_steps", "decay_fraction"),
)
"""Keys of ``optim`` that make up the table of rates."""
NUMBER_KEYS = ("weight_decay", "clip_norm", "ema")
"""Keys of ``optim`` that are a number each. Whether ``clip_norm`` and ``ema`` are there at all belongs to the program."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tunable(Generic[T]):
    """Arguments of a train step besides state, batch and seed; arrays, or shapes of arrays."""

    rates: T
    """float32 [updates]: the rate of each update; the last one is also that of all later ones."""
    weight_decay: T
    clip_norm: T | None
    ema: T | None
    dropouts: dict[str, RunTimeRate]
    """Rates of dropout by their field of the family's Config."""


def tunable_of(
    config: OptimConfig, total_steps: int, length: int, dropouts: Mapping[str, float] = _NONE
) -> Tunable[np.ndarray]:
    """The values of one run.

    Args:
      total_steps: updates of the run.
      length: of the table, at least ``total_steps``.
      dropouts: rates of dropout by field of the Config.

    Raises:
      UserError: settings that describe no schedule.
    """
    if length < total_steps:
        raise ValueError(f"a table of {length} rates for {total_steps} updates")
    rates = rate_table(make_schedule(config, total_steps), total_steps)
    return Tunable(
        rates=np.pad(rates, (0, length - total_steps), mode="edge"),
        weight_decay=np.array(config.weight_decay, np.float32),
        clip_norm=None if config.clip_norm is None else np.array(config.clip_norm, np.float32),
        ema=None if config.ema is None else np.array(config.ema, np.float32),
        dropouts={name: run_time_rate(rate) for name, rate in dropouts.items()},
    )


def rate_table(schedule: Schedule, total_steps: int) -> np.ndarray:
    """The rate of each update as a compiled step computes it: float32 [updates].

    Compiled, and for one update at a time: operation by operation, or in vectors, the last bit may be another.
    """
    counts = np.arange(total_steps, dtype=np.int32)
    # Compiled apart from jit's own cache, which would keep a program for each run.
    return np.asarray(jax.jit(lambda steps: jax.lax.map(schedule, steps)).lower(counts).compile()(counts))


def shapes_of(
    config: OptimConfig, length: int, sharding: Sharding, dropouts: Collection[str] = ()
) -> Tunable[jax.ShapeDtypeStruct]:
    """The same as shapes."""
    some = {name: run_time_rate(0.0) for name in dropouts}
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
    return Tunable(
        rates=jax.ShapeDtypeStruct((length,), jnp.float32, sharding=sharding),
        weight_decay=number,
        clip_norm=None if config.clip_norm is None else number,
        ema=None if config.ema is None else number,
        dropouts=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), leaf.dtype, sharding=sharding), some),
    )


def table_schedule(rates: jax.Array) -> Schedule:
    """The schedule that a table of rates [updates] holds."""

    def schedule(step: ArrayLike) -> jax.Array:
        return rates[jnp.minimum(step, rates.shape[0] - 1)]

    return schedule
