"""The train step and the evaluation step: pure functions, jitted once per batch shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.tasks.contract import Forward, Task
from jaxft.training.optim import global_norm, update_count, update_ema
from jaxft.training.state import TrainState

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]

_PREPARE = 0x7A5C  # the task's stream of random numbers, apart from that of dropout


def apply_model(model: Any, params: Any, batch: Batch, key: jax.Array | None) -> Any:
    """The model's output on a batch."""
    inputs = {name: batch[name] for name in model.facts.inputs if name in batch}
    return model.apply({"params": params}, **inputs, key=key)


def forward_of(model: Any, params: Any) -> Forward:
    """The model's forward pass as tasks call it."""
    return lambda batch, key: apply_model(model, params, batch, key)


def _once(forward: Forward) -> Forward:
    """The same, traced once for each batch: sums and outputs of one batch share its output."""
    seen: list[tuple[Batch, Any, Any]] = []

    def output_of(batch: Batch, key: jax.Array | None) -> Any:
        for known, used, output in seen:
            if known is batch and used is key:
                return output
        seen.append((batch, key, forward(batch, key)))
        return seen[-1][2]

    return output_of


def make_train_step(
    model: Any,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    *,
    accumulation: int = 1,
    ema: float | None = None,
    param_shardings: Any = None,
    frozen: Any = None,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Sums]]:
    """One optimizer step as a pure function ``(state, batch, seed) -> (state, metrics)``.

    The loss is summed over the batch and divided by the batch's total weight, whatever the number of micro-batches, devices
    and padding rows. The only randomness is ``fold_in(key(seed), step)``. A step whose loss or gradient is not finite
    leaves parameters and optimizer unchanged and is counted.

    Args:
      accumulation: micro-batches per step.
      ema: decay of the moving average of the parameters, or None.
      param_shardings: gradients are constrained to these (in Auto mode they were seen to come out unsharded). None: not.
      frozen: tree of bool, True for parameters that get no gradient. None: all do.
    """
    # By their specs alone: on an Explicit mesh, the one set in the step is its Auto twin.
    specs = None if param_shardings is None else jax.tree.map(lambda sharding: sharding.spec, param_shardings)

    def gradient_of(params: Any, batch: Batch, key: jax.Array, weight: jax.Array) -> tuple[Any, Sums]:
        trained, join = _without(params, frozen)

        def loss_of(trained: list[Any]) -> tuple[jax.Array, Sums]:
            sums = task.sums(forward_of(model, join(trained)), batch, key)
            # What else is counted is for evaluations: left out here, the compiler drops it.
            return sums["loss"] / weight, {name: sums[name] for name in ("loss", "weight")}

        gradient, sums = jax.grad(loss_of, has_aux=True)(trained)
        if specs is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, _without(specs, frozen)[0])
        return gradient, sums

    def train_step(state: TrainState, batch: Batch, seed: Any) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = task.prepare(batch, jax.random.fold_in(key, _PREPARE))
        weight = jnp.maximum(task.weight(batch), 1e-30)
        trained, sums = _accumulated(gradient_of, accumulation, state.params, batch, key, weight)
        norm = global_norm(trained)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)

        count = update_count(state.opt_state)  # of the steps that were taken, not those that were skipped

        def take(params: Any, opt_state: Any, average: Any) -> tuple[Any, Any, Any]:
            gradient = _without(jax.tree.map(jnp.zeros_like, params), frozen)[1](trained)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            return params, opt_state, None if ema is None else update_ema(average, params, ema, count)

        # A branch updates the donated arrays in place. Selecting each element afterwards would need old and new side by
        # side: on CPUs that was 835 MiB more and twice the time for BERT-base.
        old = (state.params, state.opt_state, state.ema)
        params, opt_state, average = jax.lax.cond(finite, take, lambda *old: old, *old)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + skipped,
            streak=(state.streak + 1) * skipped,
            params=params,
            opt_state=opt_state,
            ema=average,
        )
        metrics = sums | {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(count), jnp.float32),
            "skipped": new_state.skipped,
            "streak": new_state.streak,
            "tokens": batch["mask"].sum(),
        }
        return new_state, metrics

    return train_step


def _without(tree: Any, frozen: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of ``tree`` that are not frozen, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    stays = [False] * len(leaves) if frozen is None else jax.tree.leaves(frozen)

    def join(trained: list[Any]) -> Any:
        given = iter(trained)
        return structure.unflatten([leaf if stay else next(given) for leaf, stay in zip(leaves, stays, strict=True)])

    return [leaf for leaf, stay in zip(leaves, stays, strict=True) if not stay], join


def _accumulated(
    gradient_of: Callable[..., tuple[Any, Sums]],
    accumulation: int,
    params: Any,
    batch: Batch,
    key: jax.Array,
    weight: jax.Array,
) -> tuple[Any, Sums]:
    """Gradients of the trained leaves and sums of a batch, over ``accumulation`` micro-batches in turn."""
    if accumulation == 1:
        return gradient_of(params, batch, key, weight)
    # Micro-batch i takes rows i::k, so that each device keeps the rows it has.
    micro = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(gradient_of, params, jax.tree.map(lambda x: x[0], micro), key, weight)
    # In bfloat16, small micro-batches would be rounded away beside the total.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)

    def add(total: tuple[Any, Sums], item: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Sums], None]:
        part, index = item
        parts = gradient_of(params, part, jax.random.fold_in(key, index), weight)
        return jax.tree.map(lambda t, p: t + p.astype(t.dtype), total, parts), None

    return jax.lax.scan(add, zeros, (micro, jnp.arange(accumulation)))[0]


def make_eval_step(model: Any, task: Task) -> Callable[[Any, Batch], tuple[Sums, Batch]]:
    """``(params, batch) -> (sums over the batch, outputs per row)`` of the task.

    Rows of weight 0 add nothing to the sums, and each call gives the same.
    """

    def eval_step(params: Any, batch: Batch) -> tuple[Sums, Batch]:
        batch = task.prepare(batch, jax.random.key(_PREPARE))
        forward = _once(forward_of(model, params))
        return task.sums(forward, batch, None), task.outputs(forward, batch)

    return eval_step
