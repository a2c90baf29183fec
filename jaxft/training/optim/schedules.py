"""Learning rate as a function of the number of updates done so far.

Every schedule is a linear warm-up from 0 to the peak followed by a shape. As in the Trainer of transformers, update
number ``step`` (from 0) of the warm-up applies ``peak * step / warmup_steps``: the very first update has rate 0 and
only fills the optimizer's moments, and update ``warmup_steps`` is the first at the peak. The shapes are those of
``transformers.optimization`` where it has them, so a rate curve carries over from there point by point, with two
exceptions: ``inverse_sqrt`` without warm-up uses timescale 1 (transformers: 10,000), and a warm-up given as a fraction
leaves at least one step after it, so that a run of one step trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import UserError

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from jaxft.config import OptimConfig

Schedule = Callable[["ArrayLike"], jax.Array]
"""Updates done so far (an int, an integer array or a traced one) -> rate of the next one, float32 of the same shape."""


def warmup_steps_of(config: OptimConfig, total_steps: int) -> int:
    """Length of the warm-up; a fraction is rounded up, as transformers does."""
    if total_steps < 1:
        raise UserError(f"a schedule of {total_steps} steps: a run has at least 1; raise train.steps or train.epochs")
    if config.warmup_steps is None:
        return min(math.ceil(config.warmup_fraction * total_steps), total_steps - 1)
    if config.warmup_steps > total_steps:
        raise UserError(
            f"optim.warmup_steps={config.warmup_steps}: longer than the whole run of {total_steps} steps;"
            " lower it, or train longer"
        )
    return config.warmup_steps


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """The learning rate of a run of ``total_steps`` updates; usable inside and outside jit.

    Raises:
      UserError: settings that describe no schedule, such as a warm-up longer than the run.
    """
    warmup = warmup_steps_of(config, total_steps)
    _check_end(config)
    shape = _SHAPES[config.schedule](config, total_steps, warmup)
    if warmup:
        rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
        shape = optax.join_schedules([rise, shape], [warmup])

    def schedule(step: ArrayLike) -> jax.Array:
        return jnp.asarray(shape(jnp.asarray(step)), jnp.float32)

    return schedule


def _check_end(config: OptimConfig) -> None:
    if not 0 <= config.end_factor <= 1:
        raise UserError(f"optim.end_factor={config.end_factor}: must lie in 0..1, a share of the peak rate")


# Each shape below counts steps from the end of the warm-up and starts at the peak.


def _constant(config: OptimConfig, total: int, warmup: int) -> optax.Schedule:
    del total, warmup
    return optax.constant_schedule(config.learning_rate)


def _linear(config: OptimConfig, total: int, warmup: int) -> optax.Schedule:
    peak = config.learning_rate
    return optax.linear_schedule(peak, peak * config.end_factor, max(total - warmup, 1))


def _cosine(config: OptimConfig, total: int, warmup: int) -> optax.Schedule:
    """Half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return optax.cosine_decay_schedule(config.learning_rate, max(total - warmup, 1), alpha=config.end_factor)


def _polynomial(config: OptimConfig, total: int, warmup: int) -> optax.Schedule:
    if config.power <= 0:
        raise UserError(f"optim.power={config.power}: must be above 0 (1 is a straight line)")
    peak = config.learning_rate
    return optax.polynomial_schedule(peak, peak * config.end_factor, config.power, max(total - warmup, 1))


def _step(config: OptimConfig, total: int, warmup: int) -> optax.Schedule:
    """Drops at fixed shares of the run (He et al. 2016)."""
    shares = config.step_fractions
    if not all(0 < share < 1 for share in shares) or list(shares) != sorted(set(shares)):
        raise UserError(f"optim.step_fractions={list(shares)}: must rise and lie between 0 and 1")
    _check_step_factor(config)
    drops: dict[int, float] = {}
    for share in shares:
        at = round(share * total) - warmup
        if at <= 0:
            raise UserError(
                f"optim.step_fractions={list(shares)}: the drop at step {at + warmup} of {total} comes before the end"
                f" of the warm-up at step {warmup}; shorten the warm-up or move the drop"
            )
        # In a very short run two drops may fall on one step: both then apply.
        drops[at] = drops.get(at, 1.0) * config.step_factor
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def _exponential(config: OptimConfig, total: int, warmup: int) -> optax.Schedule:
    del warmup
    _check_step_factor(config)
    if config.exponential_steps is not None and config.exponential_steps < 1:
        raise UserError(f"optim.exponential_steps={config.exponential_steps}: must be at least 1")
    per_factor = config.exponential_steps or max(round(total / 2), 1)
    peak = config.learning_rate
    return optax.exponential_decay(peak, per_factor, config.step_factor, end_value=peak * config.end_factor)


def _check_step_factor(config: OptimConfig) -> None:
    if not 0 < config.step_factor < 1:
        raise UserError(f"optim.step_factor={config.step_factor}: must lie between 0 and 1, or the rate would not fall")


def _inverse_sqrt(config: OptimConfig, total: int, warmup: int) -> optax.Schedule:
    """Vaswani et al. 2017 (and Zhai et al. 2022): falls with the root of the step, whatever the length of the run."""
    del total
    timescale = max(warmup, 1)

    def schedule(step: ArrayLike) -> jax.Array:
        return config.learning_rate * jnp.sqrt(timescale / (jnp.maximum(step, 0) + timescale))

    return schedule


def _warmup_stable_decay(config: OptimConfig, total: int, warmup: int) -> optax.Schedule:
    """Constant, then a short straight fall (Zhai et al. 2022; Hu et al. 2024, MiniCPM)."""
    decay = round(config.decay_fraction * total)
    stable = total - warmup - decay
    if stable < 0:
        raise UserError(
            f"optim.decay_fraction={config.decay_fraction}: {decay} steps of decay do not fit beside {warmup} of"
            f" warm-up in a run of {total}; lower one of the two"
        )
    if decay == 0:
        return _constant(config, total, warmup)
    peak = config.learning_rate
    return optax.linear_schedule(peak, peak * config.end_factor, decay, transition_begin=stable)


_SHAPES: dict[str, Callable[[OptimConfig, int, int], optax.Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "step": _step,
    "exponential": _exponential,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}
