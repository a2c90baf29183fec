"""The train step and the evaluation step: pure functions, jitted once per batch shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxft.models.contract import Model, Output
from jaxft.tasks.contract import Forward, Scheduled, Task
from jaxft.training.optim import global_norm, update_count, update_ema, without_frozen
from jaxft.training.optim.schedules import Schedule
from jaxft.training.spikes import stands_out, with_step
from jaxft.training.state import TrainState
from jaxft.trees import Params, Tree

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]
Gradient = Callable[[Params, Batch, jax.Array, jax.Array], tuple[list[jax.Array], Sums]]
"""``(params, prepared batch, dropout key, weight) -> (gradients of the leaves that train, summed loss and weight)``; the gradient is
of the summed loss divided by ``weight``, a scalar."""

Step = Callable[[TrainState[jax.Array], Batch, ArrayLike], tuple[TrainState[jax.Array], Sums]]

_PREPARE = 0x7A5C  # the task's stream of random numbers, apart from that of dropout
_MIX = 0x3D1B  # and that of what only training does to a batch


def apply_model(model: Model, params: Params, batch: Batch, key: jax.Array | None) -> Output:
    """The model's output on a batch."""
    inputs = {name: batch[name] for name in model.facts.inputs if name in batch}
    return model.apply({"params": params}, **inputs, key=key)


def forward_of(model: Model, params: Params) -> Forward:
    """The model's forward pass as tasks call it."""
    return lambda batch, key: apply_model(model, params, batch, key)


def _once(forward: Forward) -> Forward:
    """The same, traced once for each batch: sums and outputs of one batch share its output."""
    seen: list[tuple[Batch, jax.Array | None, Output]] = []

    def output_of(batch: Batch, key: jax.Array | None) -> Output:
        for known, used, output in seen:
            same = known.keys() == batch.keys() and all(known[name] is batch[name] for name in known)
            if same and used is key:
                return output
        seen.append((batch, key, forward(batch, key)))
        return seen[-1][2]

    return output_of


def make_train_step(
    task: Task,
    gradient_of: Gradient,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    ema: float | jax.Array | None = None,
    frozen: Tree[bool] | None = None,
    spike_skip: float | None = None,
) -> Step:
    """One optimizer step as a pure function ``(state, batch, seed) -> (state, metrics)``.

    The loss is summed over the batch and divided by the batch's total weight, whatever the number of micro-batches, devices
    and padding rows. The only randomness is ``fold_in(key(seed), step)``. A step whose loss or gradient is not finite
    leaves parameters and optimizer unchanged and is counted; so does one that ``spike_skip`` leaves out.

    Args:
      gradient_of: where gradients come from, of :mod:`jaxft.training.gradients`.
      ema: decay of the moving average of the parameters, or None.
      frozen: tree of bool, True for parameters that ``gradient_of`` leaves out. None: it leaves out none.
      spike_skip: standard deviations (:mod:`jaxft.training.spikes`) above which a step changes nothing either; the state has ``recent``.
        None: finite steps are all taken.
    """

    def train_step(state: TrainState[jax.Array], batch: Batch, seed: ArrayLike) -> tuple[TrainState[jax.Array], Sums]:
        batch, key, weight = prepared(task, batch, seed, state.step)
        trained, sums = gradient_of(state.params, batch, key, weight)
        norm = global_norm(trained)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
        taken, recent, counted = finite, state.recent, dict[str, jax.Array]()
        if spike_skip is not None:
            assert recent is not None
            mean = sums["loss"] / weight
            spike = finite & stands_out(recent, mean, norm, spike_skip)
            taken, recent = finite & ~spike, with_step(recent, mean, norm, finite, spike)
            counted = {"spikes": recent.spikes}

        count = update_count(state.opt_state)  # of the steps that were taken, not those that were skipped

        def take(
            params: Params, opt_state: optax.OptState, average: Params | None
        ) -> tuple[Params, optax.OptState, Params | None]:
            gradient = without_frozen(jax.tree.map(jnp.zeros_like, params), frozen)[1](trained)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = cast(Params, optax.apply_updates(params, updates))
            return params, opt_state, None if ema is None else update_ema(average, params, ema, count)

        # A branch updates the donated arrays in place. Selecting each element afterwards would need old and new side by
        # side: on CPUs that was 835 MiB more and twice the time for BERT-base.
        old = (state.params, state.opt_state, state.ema)
        params, opt_state, average = jax.lax.cond(taken, take, lambda *old: old, *old)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + skipped,
            streak=(state.streak + 1) * skipped,
            params=params,
            opt_state=opt_state,
            ema=average,
            recent=recent,
        )
        metrics = (
            sums
            | counted
            | {
                "grad_norm": norm,
                "learning_rate": jnp.asarray(schedule(count), jnp.float32),
                "skipped": new_state.skipped,
                "streak": new_state.streak,
                "tokens": batch["mask" if "mask" in batch else "weights"].sum(),
            }
        )
        return new_state, metrics

    return train_step


def prepared(task: Task, batch: Batch, seed: ArrayLike, step: ArrayLike) -> tuple[Batch, jax.Array, jax.Array]:
    """What the gradient of a step is of: the batch as the task prepares it, the key of its dropout, its weight.

    Args:
      step: steps before it.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    batch = prepared_at(task, batch, jax.random.fold_in(key, _PREPARE), step)
    mixed: Callable[[Batch, jax.Array], Batch] | None = getattr(task, "mixed", None)
    batch = batch if mixed is None else mixed(batch, jax.random.fold_in(key, _MIX))
    return batch, key, jnp.maximum(task.weight(batch), 1e-30)


def prepared_at(task: Task, batch: Batch, key: jax.Array, step: ArrayLike) -> Batch:
    """A training batch as the task prepares it for a step (:class:`~jaxft.tasks.contract.Scheduled`)."""
    if hasattr(task, "prepare_at"):
        return cast(Scheduled, task).prepare_at(batch, key, step)
    return task.prepare(batch, key)


def make_eval_step(model: Model, task: Task) -> Callable[[Params, Batch], tuple[Sums, Batch]]:
    """``(params, batch) -> (sums over the batch, outputs per row)`` of the task.

    Rows of weight 0 add nothing to the sums, and each call gives the same.
    """
    written: Callable[[Model, Params, Batch], Batch] | None = getattr(task, "written", None)

    def eval_step(params: Params, batch: Batch) -> tuple[Sums, Batch]:
        batch = task.prepare(batch, jax.random.key(_PREPARE))
        forward = _once(forward_of(model, params))
        texts = {} if written is None else written(model, params, batch)
        return task.sums(forward, batch, None), task.outputs(forward, batch) | texts

    return eval_step
