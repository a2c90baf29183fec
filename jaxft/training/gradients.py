"""Where a train step's gradients come from: the whole batch (:func:`of_batch`), or each of its rows (:func:`of_each_row`).

Dims: B rows of a batch, R rows at a time.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.errors import UserError
from jaxft.models.contract import Model
from jaxft.parallel.sharding import AxisRules, run_mesh
from jaxft.tasks.contract import Comparing, Task
from jaxft.training.optim import global_norm, without_frozen
from jaxft.training.step import Batch, Gradient, Sums, forward_of
from jaxft.trees import Params, Shardings, Tree

_Total = tuple[list[jax.Array], Sums]
_PULLED = "pulled back to "
MICRO_BATCHES = "micro_batches"
"""The scope of the loop over them."""


def of_batch(
    model: Model,
    task: Task,
    *,
    accumulation: int = 1,
    param_shardings: Shardings | None = None,
    frozen: Tree[bool] | None = None,
) -> Gradient:
    """The gradient of a batch's summed loss, divided by its weight.

    Args:
      accumulation: micro-batches, one after the other.
      param_shardings: gradients are constrained to these (in Auto mode they were seen to come out unsharded). None: not.
      frozen: tree of bool, True for parameters that get no gradient. None: all do.
    """
    # By their specs alone: on an Explicit mesh, the one set in the step is its Auto twin.
    specs = None if param_shardings is None else jax.tree.map(lambda sharding: sharding.spec, param_shardings)

    def placed(gradient: list[jax.Array]) -> list[jax.Array]:
        return (
            gradient if specs is None else jax.lax.with_sharding_constraint(gradient, without_frozen(specs, frozen)[0])
        )

    def gradient_of(params: Params, batch: Batch, key: jax.Array, weight: jax.Array) -> tuple[list[jax.Array], Sums]:
        trained, join = without_frozen(params, frozen)

        def loss_of(trained: list[jax.Array]) -> tuple[jax.Array, Sums]:
            sums = task.sums(forward_of(model, join(trained)), batch, key)
            # What else is counted is for evaluations: left out here, the compiler drops it.
            return sums["loss"] / weight, {name: sums[name] for name in ("loss", "weight")}

        gradient, sums = jax.grad(loss_of, has_aux=True)(trained)
        return placed(gradient), sums

    def pulled_back(params: Params, batch: Batch, key: jax.Array, weight: jax.Array) -> tuple[list[jax.Array], Sums]:
        """The gradient of what rows are compared by, pulled back from that of the loss, which ``batch`` has under names that begin with
        ``_PULLED``."""
        del weight
        trained, join = without_frozen(params, frozen)
        rows = {name: value for name, value in batch.items() if not name.startswith(_PULLED)}

        def product(trained: list[jax.Array]) -> jax.Array:
            found = cast(Comparing, task).represent(forward_of(model, join(trained)), rows, key)
            return jnp.stack([(value * batch[_PULLED + name]).sum() for name, value in found.items()]).sum()

        return placed(jax.grad(product)(trained)), {}

    def gradient(params: Params, batch: Batch, key: jax.Array, weight: jax.Array) -> tuple[list[jax.Array], Sums]:
        if accumulation == 1 or not compares(task):
            return _accumulated(gradient_of, accumulation, params, batch, key, weight)
        comparing = cast(Comparing, task)

        def represented(item: tuple[Batch, jax.Array]) -> Batch:
            return comparing.represent(forward_of(model, params), item[0], jax.random.fold_in(key, item[1]))

        parts = jax.lax.map(represented, (_in_parts(batch, accumulation), jnp.arange(accumulation)))
        found = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)

        def loss_of(found: Batch) -> tuple[jax.Array, Sums]:
            sums = comparing.compare(found, batch)
            return sums["loss"] / weight, {name: sums[name] for name in ("loss", "weight")}

        pulled, sums = jax.grad(loss_of, has_aux=True)(found)
        batch = batch | {_PULLED + name: value for name, value in pulled.items()}
        return _accumulated(pulled_back, accumulation, params, batch, key, weight)[0], sums

    return gradient


def compares(task: Task) -> bool:
    """Whether a task's loss compares the rows of a batch with each other (:class:`~jaxft.tasks.contract.Comparing`)."""
    return hasattr(task, "represent")


def _in_parts(batch: Batch, parts: int) -> Batch:
    """[parts, rows, ...]: part i takes rows i::parts, so that each device keeps the rows it has."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _accumulated(
    gradient_of: Gradient, accumulation: int, params: Params, batch: Batch, key: jax.Array, weight: jax.Array
) -> tuple[list[jax.Array], Sums]:
    """Gradients of the trained leaves and sums of a batch, over ``accumulation`` micro-batches in turn."""
    if accumulation == 1:
        return gradient_of(params, batch, key, weight)
    micro = _in_parts(batch, accumulation)
    shapes = jax.eval_shape(gradient_of, params, jax.tree.map(lambda x: x[0], micro), key, weight)
    # In bfloat16, small micro-batches would be rounded away beside the total.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)

    def add(total: _Total, item: tuple[Batch, jax.Array]) -> tuple[_Total, None]:
        part, index = item
        parts = gradient_of(params, part, jax.random.fold_in(key, index), weight)
        return jax.tree.map(lambda t, p: t + p.astype(t.dtype), total, parts), None

    with jax.named_scope(MICRO_BATCHES):
        return jax.lax.scan(add, zeros, (micro, jnp.arange(accumulation)))[0]


def of_rows(model: Model, task: Task, frozen: Tree[bool] | None = None) -> Gradient:
    """``(params, batch [R], key, numbers [R]) -> (a gradient [R, ...] per trained leaf, loss and weight [R])``, a row at a time.

    The loss of a row is its summed loss as the task weighs it, not divided by anything: of a text to be classified, its cross-entropy
    times the weight of its class; in language modelling, the sum over its predicted tokens, so that long texts weigh more. A row of
    weight 0 has no gradient. Its dropout follows from ``key`` and its number, whatever rows are computed beside it.

    Args:
      frozen: as of :func:`of_batch`.
    """

    def of_row(params: Params, row: Batch, key: jax.Array, number: jax.Array) -> tuple[list[jax.Array], Sums]:
        trained, join = without_frozen(params, frozen)
        alone = jax.tree.map(lambda x: x[None], row)

        def loss_of(trained: list[jax.Array]) -> tuple[jax.Array, Sums]:
            sums = task.sums(forward_of(model, join(trained)), alone, jax.random.fold_in(key, number))
            return sums["loss"], {name: sums[name] for name in ("loss", "weight")}

        gradient, sums = jax.grad(loss_of, has_aux=True)(trained)
        counts = sums["weight"] > 0  # not by a product: what padding gives may not be finite
        return jax.tree.map(lambda x: jnp.where(counts, x, jnp.zeros_like(x)), (gradient, sums))

    return jax.vmap(of_row, in_axes=(None, 0, None, 0))


def of_each_row(
    model: Model,
    task: Task,
    clip: float,
    at_once: int,
    *,
    param_shardings: Shardings | None = None,
    frozen: Tree[bool] | None = None,
) -> Gradient:
    """The gradients of rows (:func:`of_rows`), each shortened to a norm of ``clip`` at most, summed, and divided by the weight that
    the step gives: the core of DP-SGD (Abadi et al. 2016). No row moves the sum by more than ``clip``, whatever is in it.

    Without anything to shorten, this is :func:`of_batch`, but for its dropout. It adds no noise and keeps no account of privacy: who
    does divides by a number that says nothing of the data. Parameters of which only some layers are frozen count in the norm.

    Args:
      clip: Euclidean norm of a row's gradient, over all parameters together.
      at_once: R, rows whose gradients each device holds side by side; their memory is R times that of the parameters.
      param_shardings, frozen: as of :func:`of_batch`. Each device computes its own rows with whole parameters: nothing but rows may
        be split.

    Raises:
      UserError: the task compares the rows of a batch; or, of the call, where a mesh splits anything but rows, or ``at_once`` does not
        divide the rows of a device.
    """
    if not clip > 0 or at_once < 1:
        raise UserError(f"gradients of each row: clip={clip} must be above 0, at_once={at_once} at least 1")
    if compares(task):
        raise UserError(
            "gradients of each row: the task compares the rows of a batch, so that no row has a loss of its own"
        )
    gradients_of = of_rows(model, task, frozen)

    def clipped(params: Params, batch: Batch, key: jax.Array, numbers: jax.Array) -> tuple[list[jax.Array], Sums]:
        gradients, sums = gradients_of(params, batch, key, numbers)
        norms = jax.vmap(global_norm)(gradients)
        shares = jnp.minimum(1.0, clip / jnp.maximum(norms, 1e-30))

        def shortened(x: jax.Array) -> jax.Array:
            return (x.astype(jnp.float32) * shares.reshape(-1, *[1] * (x.ndim - 1))).sum(0)

        return jax.tree.map(shortened, gradients), jax.tree.map(lambda x: x.sum(0), sums)

    def gradient(params: Params, batch: Batch, key: jax.Array, weight: jax.Array) -> tuple[list[jax.Array], Sums]:
        def of_device(params: Params, batch: Batch, key: jax.Array, numbers: jax.Array) -> tuple[list[jax.Array], Sums]:
            return _in_turn(clipped, at_once, params, batch, key, numbers)

        numbers = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
        axes = _row_axes(model.compute.rules, param_shardings)
        run = _on_devices(of_device, axes) if axes else of_device
        total, sums = run(params, batch, key, numbers)
        return jax.tree.map(lambda x: x / weight, total), sums

    return gradient


def _in_turn(
    clipped: Gradient,
    at_once: int,
    params: Params,
    batch: Batch,
    key: jax.Array,
    numbers: jax.Array,
) -> tuple[list[jax.Array], Sums]:
    """The sum over groups of ``at_once`` rows."""
    if (rows := numbers.size) % at_once:
        raise UserError(f"gradients of each row: at_once={at_once} does not divide the {rows} rows of a device")
    if rows == at_once:
        return clipped(params, batch, key, numbers)
    groups = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (batch, numbers))
    some_rows, some_numbers = jax.tree.map(lambda x: x[0], groups)
    shapes = jax.eval_shape(clipped, params, some_rows, key, some_numbers)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: _Total, group: tuple[Batch, jax.Array]) -> tuple[_Total, None]:
        return jax.tree.map(jnp.add, total, clipped(params, group[0], key, group[1])), None

    return jax.lax.scan(add, zeros, groups)[0]


def _row_axes(rules: AxisRules, param_shardings: Shardings | None) -> tuple[str, ...]:
    """The axes of the current mesh that split rows."""
    mesh = run_mesh()
    if mesh is None:
        return ()
    of_params = jax.tree.leaves(jax.tree.map(lambda sharding: [*sharding.spec], param_shardings))
    split = {axis for entry in of_params for axis in ([entry] if isinstance(entry, str) else entry or ())}
    axes = dict(rules.table)["batch"]
    others = [name for name in mesh.axis_names if mesh.shape[name] > 1 and (name not in axes or name in split)]
    if others:
        raise UserError(
            f"gradients of each row: the mesh splits more than rows ({', '.join(others)}); only mesh.data and mesh.slices may be above 1"
        )
    return axes


def _on_devices(of_device: Gradient, axes: tuple[str, ...]) -> Gradient:
    """``of_device`` of each device's rows, and the sum over devices."""

    def summed(params: Params, batch: Batch, key: jax.Array, numbers: jax.Array) -> _Total:
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), of_device(params, batch, key, numbers))

    whole, rows = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(summed, in_specs=(whole, rows, whole, rows), out_specs=whole, check_vma=False)
