"""Gradients of each row: equal to a loop over rows, clipped to a norm, the same however many are computed at once, and on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.attention.native.compiled import unavailable
from jaxft.config import MeshConfig, OptimConfig
from jaxft.config.tasks.embedding import Config
from jaxft.data.batch import Field
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.models.families import bert
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.parallel.sharding import DEFAULT_RULES, batch_sharding, make_mesh, replicated, shardings_of
from jaxft.tasks import classification, embedding, masked_lm
from jaxft.training.gradients import of_batch, of_each_row, of_rows
from jaxft.training.optim import global_norm, make_optimizer, make_schedule
from jaxft.training.state import init_state
from jaxft.training.step import make_train_step

NATIVE = pytest.param("native", marks=pytest.mark.skipif(unavailable() is not None, reason=f"native {unavailable()}"))
KEY, LENGTH = jax.random.key(5), 12
# Heads of 16, as native takes them.
SIZES = dataclasses.replace(bert.TINY, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, num_labels=3)
TASKS: dict[str, Any] = {
    "classification": classification.Task(("a", "b", "c"), class_weights=(0.5, 1.0, 2.0)),
    "masked_lm": masked_lm.Task(4, (0, 1, 2, 3, 4), SIZES.vocab_size, 0.4),
}
# Half the time to compile.
jitted = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def model_of(task: str, attention: str = "xla", rate: float = 0.0) -> Any:
    sizes = dataclasses.replace(SIZES, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
    return bert.Model(sizes, TASKS[task].head, Compute(attention=attention, dropout_bits="hash"))


@functools.cache
def params_of(task: str) -> Any:
    return jax.tree.map(lambda x: x + 0.02, init_params(model_of(task), 0))


def batch_of(task: str, rows: int = 8, padding: int = 2) -> dict[str, jax.Array]:
    """A prepared batch of rows of all lengths, the last of which are padding of the batch."""
    rng = np.random.default_rng(0)
    mask = (np.arange(LENGTH) < rng.integers(4, LENGTH + 1, (rows, 1))).astype(np.int32)
    made = {
        "tokens": rng.integers(5, SIZES.vocab_size, (rows, LENGTH)).astype(np.int32) * mask,
        "mask": mask,
        "types": 0 * mask,
        "labels": rng.integers(0, 3, rows).astype(np.int32),
        "weights": np.ones(rows, np.float32),
    }
    for name, array in made.items():
        array[rows - padding :] = 1 if name == "mask" else 0
    return TASKS[task].prepare(jax.tree.map(jnp.asarray, made), jax.random.key(1))


def assert_near(one: Any, other: Any, tolerance: float = 2e-6) -> None:
    """Of each leaf, off by no more than so much of the largest number in the tree."""
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@functools.cache
def looped(task: str, rate: float = 0.0) -> list[Any]:
    """The gradient of each row's summed loss, one at a time, by the task's own sums and nothing else."""
    made, model, batch = TASKS[task], model_of(task, rate=rate), batch_of(task)

    @jitted
    def one(params: Any, row: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            inputs = {name: row[name] for name in model.facts.inputs if name in row}
            return made.sums(lambda batch, key: model.apply({"params": params}, **inputs, key=key), row, key)["loss"]

        return jax.grad(loss)(params)

    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(8)]
    return [one(params_of(task), row, jax.random.fold_in(KEY, i)) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("task", "attention"),
    [
        pytest.param("classification", "blockwise", marks=pytest.mark.slow),
        pytest.param("classification", "xla", marks=pytest.mark.slow),
        pytest.param("classification", "native", marks=(*NATIVE.marks, pytest.mark.slow)),
        pytest.param("masked_lm", "blockwise", marks=pytest.mark.slow),
        pytest.param("masked_lm", "xla", marks=pytest.mark.slow),
        pytest.param("masked_lm", "native", marks=NATIVE.marks),
    ],
)
def test_gradients_of_rows_are_those_of_a_loop(task: str, attention: str) -> None:
    made, model = TASKS[task], model_of(task, attention)
    found, sums = jitted(of_rows(model, made))(params_of(task), batch_of(task), KEY, jnp.arange(8))
    for i, wanted in enumerate(looped(task)):
        assert_near([x[i] for x in found], jax.tree.leaves(wanted))
    # Padding of the batch has none, exactly.
    assert all(not np.asarray(x[6:]).any() for x in found)
    np.testing.assert_array_equal(np.asarray(sums["weight"][6:]), 0.0)
    assert (np.asarray(sums["weight"][:6]) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("attention", [NATIVE, "blockwise"])
def test_dropout_of_a_row_follows_its_number(attention: str) -> None:
    model, task = model_of("classification", attention, 0.2), TASKS["classification"]
    batch, numbers = batch_of("classification"), jnp.asarray([5, 0, 3])
    part = jax.tree.map(lambda x: x[numbers], batch)
    found, _ = jitted(of_rows(model, task))(params_of("classification"), part, KEY, numbers)
    for at, number in enumerate((5, 0, 3)):
        assert_near([x[at] for x in found], jax.tree.leaves(looped("classification", 0.2)[number]))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_each_row_is_clipped_and_groups_change_nothing(task: str) -> None:
    made, model, batch = TASKS[task], model_of(task), batch_of(task)
    rows = looped(task)
    norms = [float(global_norm(row)) for row in rows]
    clip = sorted(norms[:6])[3]  # shortens two of them, or three
    assert min(norms[:6]) < 0.999 * clip < max(norms) * 0.99
    shares = [min(1.0, clip / norm) if norm else 0.0 for norm in norms]
    wanted = jax.tree.map(lambda *x: sum(s * g for s, g in zip(shares, x, strict=True)) / 7.0, *rows)
    for at_once in (2, 8):
        gradient_of = jitted(of_each_row(model, made, clip, at_once))
        found, sums = gradient_of(params_of(task), batch, KEY, jnp.float32(7.0))
        assert_near(found, jax.tree.leaves(wanted))
        np.testing.assert_allclose(sums["weight"], made.weight(batch), rtol=1e-6)
    # One row alone comes out with the norm itself.
    longest = int(np.argmax(norms))
    alone = jax.tree.map(lambda x: x[longest : longest + 1], batch)
    found, _ = jitted(of_each_row(model, made, clip, 1))(params_of(task), alone, KEY, jnp.float32(1.0))
    np.testing.assert_allclose(global_norm(found), clip, rtol=2e-6)


@pytest.mark.slow
def test_without_clipping_it_is_the_gradient_of_the_batch() -> None:
    made, model, batch = TASKS["masked_lm"], model_of("masked_lm"), batch_of("masked_lm")
    arguments = (params_of("masked_lm"), batch, KEY, made.weight(batch))
    whole, sums = jitted(of_batch(model, made))(*arguments)
    found, same = jitted(of_each_row(model, made, 1e9, 4))(*arguments)
    assert_near(found, whole)
    for name, value in sums.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-6)


def test_what_padding_gives_is_not_multiplied() -> None:
    """A row of weight 0 whose loss is not finite."""
    model, made, batch = model_of("classification"), TASKS["classification"], batch_of("classification")
    poisoned = jax.tree.map(jnp.copy, params_of("classification"))
    # A token of its own, whose vector is nan.
    poisoned["embed"]["token"]["embedding"] = poisoned["embed"]["token"]["embedding"].at[7].set(jnp.nan)
    tokens = jnp.where(batch["tokens"] == 7, 8, batch["tokens"]).at[7].set(7)
    gradient_of = jitted(of_each_row(model, made, 1.0, 8))
    found, sums = gradient_of(poisoned, batch | {"tokens": tokens}, KEY, jnp.float32(1.0))
    assert all(np.isfinite(x).all() for x in [*found, *sums.values()])


@pytest.mark.slow
def test_eight_devices_give_what_one_gives() -> None:
    """Whole steps, with dropout."""
    task = "classification"
    made, model = TASKS[task], model_of(task, "auto", 0.1)
    settings = OptimConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", name="sgd")
    schedule = make_schedule(settings, 5)
    shapes, axes = shapes_and_axes(model)
    optimizer = make_optimizer(settings, schedule, shapes, axes)
    fields = {
        name: Field(("batch", "length") if value.ndim == 2 else ("batch",)) for name, value in batch_of(task).items()
    }
    ends = []
    for devices in (1, 8):
        mesh = make_mesh(MeshConfig(data=devices, fsdp=1, tensor=1), jax.devices()[:devices])
        places = shardings_of(mesh, DEFAULT_RULES, shapes, axes)
        gradient_of = of_each_row(model, made, 0.5, 16 // devices // 2, param_shardings=places)
        step = make_train_step(made, gradient_of, optimizer, schedule)
        with jax.set_mesh(mesh):
            state = init_state(jax.device_put(params_of(task), places), optimizer, False)
            batch = {
                name: jax.device_put(value, batch_sharding(mesh, DEFAULT_RULES, fields[name].axes))
                for name, value in batch_of(task, 16, 3).items()
            }
            state, metrics = jitted(step)(state, batch, jax.device_put(np.uint32(3), replicated(mesh)))
            ends.append(jax.device_get((state.params, metrics["loss"], metrics["grad_norm"])))
    assert_near(ends[1], ends[0])


def test_what_cannot_be_is_said() -> None:
    model, made, batch = model_of("classification"), TASKS["classification"], batch_of("classification")
    with pytest.raises(UserError, match=r"clip=0.0 must be above 0, at_once=4 at least 1"):
        of_each_row(model, made, 0.0, 4)
    with pytest.raises(UserError, match="compares the rows of a batch, so that no row has a loss of its own"):
        of_each_row(model, embedding.Task(Config()), 1.0, 4)
    arguments = (params_of("classification"), batch, KEY, jnp.float32(1.0))
    with pytest.raises(UserError, match=r"at_once=3 does not divide the 8 rows"):
        jax.eval_shape(of_each_row(model, made, 1.0, 3), *arguments)
    shapes, axes = shapes_and_axes(model)
    for config, named in ((MeshConfig(data=4, tensor=2, fsdp=1), "tensor"), (MeshConfig(data=2, fsdp=4), "fsdp")):
        mesh = make_mesh(config)
        places = shardings_of(mesh, DEFAULT_RULES, shapes, axes)
        with jax.set_mesh(mesh), pytest.raises(UserError, match=rf"splits more than rows \({named}\)"):
            jax.eval_shape(of_each_row(model, made, 1.0, 1, param_shardings=places), *arguments)
