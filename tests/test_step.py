"""The train step on a small network: accumulation, padding rows, the loss, the guard against non-finite steps, averages."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import OptimConfig
from jaxft.config.tasks.classification import Config
from jaxft.data.batch import Field
from jaxft.layers import dropout
from jaxft.models.contract import Facts, Output
from jaxft.tasks import Targets
from jaxft.tasks.classification import Task, cross_entropy, make_task
from jaxft.training.gradients import of_batch
from jaxft.training.optim import make_optimizer, make_schedule, update_count
from jaxft.training.processors import stand_in_tokenizer
from jaxft.training.state import TrainState, init_state
from jaxft.training.step import make_eval_step, make_train_step
from jaxft.trees import paths_of

OPTIMIZERS = ("adamw", "adam", "sgd", "momentum", "nesterov", "adafactor", "lion", "muon")
LABELS = ("a", "b", "c")
V, D, F, L, C, S = 24, 8, 12, 2, 3, 6

LAYOUT: dict[str, dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]] = {
    "embed": {"kernel": ((V, D), ("vocab", "embed"))},
    "layers": {
        "up": ((L, D, F), ("layers", "embed", "mlp")),
        "bias": ((L, F), ("layers", "mlp")),
        "down": ((L, F, D), ("layers", "mlp", "embed")),
    },
    "head": {"kernel": ((D, C), ("embed", "classes")), "bias": ((C,), ("classes",))},
}


def _part(index: int) -> Any:
    return {group: {name: leaf[index] for name, leaf in leaves.items()} for group, leaves in LAYOUT.items()}


AXES = _part(1)


class Network:
    """Mean of embeddings through a residual tanh MLP: with every kind of parameter, and quick to compile."""

    facts = Facts({name: Field(("batch", "length")) for name in ("tokens", "mask", "types")}, ())

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate

    def apply(self, variables: Any, tokens: Any, mask: Any, types: Any, key: Any) -> Output:
        p = variables["params"]
        words = p["embed"]["kernel"][tokens] * mask[..., None]
        x = words.sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        for i in range(L):
            x = x + jnp.tanh(x @ p["layers"]["up"][i] + p["layers"]["bias"][i]) @ p["layers"]["down"][i]
        return Output(x, logits=dropout(x, self.rate, key) @ p["head"]["kernel"] + p["head"]["bias"])


def random_params(dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * 0.5, dtype), _part(0), is_leaf=lambda x: isinstance(x, tuple)
    )


def random_batch(seed: int, rows: int = 16, padding: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    mask = (np.arange(S) < rng.integers(1, S + 1, (rows, 1))).astype(np.int32)
    weights = np.ones(rows, np.float32)
    batch = {
        "tokens": rng.integers(0, V, (rows, S)).astype(np.int32) * mask,
        "mask": mask,
        "types": np.zeros((rows, S), np.int32),
        "labels": rng.integers(0, C, rows).astype(np.int32),
        "weights": weights,
    }
    if padding:  # as the loader makes them
        for name in batch:
            batch[name][-padding:] = 0
    return batch


class Trainer(NamedTuple):
    step: Any
    state: Any
    schedule: Any


def make(
    *, accumulation: int = 1, rate: float = 0.0, task: Task | None = None, dtype: Any = jnp.float32, **settings: Any
) -> Trainer:
    plain: dict[str, Any] = {"learning_rate": 1e-2, "warmup_steps": 2, "schedule": "cosine"}
    config = OptimConfig(**(plain | settings))
    schedule = make_schedule(config, 20)
    params = random_params(dtype)
    optimizer = make_optimizer(config, schedule, params, AXES)
    task = task or Task(LABELS)
    network: Any = Network(rate)
    gradient_of = of_batch(network, task, accumulation=accumulation)
    step = make_train_step(task, gradient_of, optimizer, schedule, ema=config.ema)
    state = init_state(params, optimizer, config.ema is not None)
    # Half the time to compile.
    quick = {"xla_backend_optimization_level": 0}
    return Trainer(jax.jit(step, donate_argnums=0, compiler_options=quick), state, schedule)


def run(trainer: Trainer, batches: list[dict[str, np.ndarray]], seed: int = 0) -> tuple[Any, list[Any]]:
    state = jax.tree.map(jnp.copy, trainer.state)
    log = []
    for batch in batches:
        state, metrics = trainer.step(state, batch, np.uint32(seed))
        log.append(jax.device_get(metrics))
    return state, log


def assert_same_course(a: TrainState, b: TrainState, start: Any, share: float = 2e-5) -> None:
    """Each parameter has moved by the same, to a share of its largest move."""
    for path, begin in paths_of(start).items():
        x, y, begin = (np.asarray(paths_of(t)[path], np.float64) for t in (a.params, b.params, start))
        assert np.abs(x - y).max() <= share * np.abs(x - begin).max(), path


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


WEIGHTED = Task(LABELS, 0.1, (0.2, 1.0, 3.0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_micro_batches_equal_one_batch(name: str) -> None:
    # With class weights and unevenly spread padding rows, where a mean of means would be wrong.
    batches = [random_batch(i, padding=5 if i == 2 else 0) for i in range(5)]
    whole = make(name=name, task=WEIGHTED)
    parts = make(name=name, task=WEIGHTED, accumulation=4)
    (one, log_one), (four, log_four) = run(whole, batches), run(parts, batches)
    assert_same_course(one, four, whole.state.params)
    for a, b in zip(log_one, log_four, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
        assert a["weight"] == pytest.approx(b["weight"])
        assert a["tokens"] == b["tokens"]
        assert "confusion" not in a  # counting classes is for evaluations


def test_any_number_of_micro_batches() -> None:
    batches = [random_batch(0)]
    whole = make(name="sgd")
    one, _ = run(whole, batches * 4)
    for accumulation in (2, 8, 16):
        other, _ = run(make(name="sgd", accumulation=accumulation), batches * 4)
        assert_same_course(one, other, whole.state.params)


def test_micro_batches_have_their_own_dropout() -> None:
    # One row eight times: with shared dropout bits, the micro-batches would give one micro-batch's gradient.
    batch = {name: np.repeat(value[:1], 8, axis=0) for name, value in random_batch(0).items()}
    once = {name: value[:1] for name, value in batch.items()}
    many, _ = run(make(name="sgd", rate=0.5, accumulation=8), [batch] * 4)
    one, _ = run(make(name="sgd", rate=0.5), [once] * 4)
    assert np.abs(np.asarray(many.params["head"]["kernel"]) - np.asarray(one.params["head"]["kernel"])).max() > 1e-4


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    # One row of weight 1 in the first micro-batch and many small ones after: in bfloat16 those would be rounded away.
    batch = random_batch(0, rows=64)
    batch["weights"] = np.where(np.arange(64) == 0, 1.0, 1 / 256).astype(np.float32)
    exact, _ = run(make(name="sgd", clip_norm=None, learning_rate=1.0, warmup_steps=0), [batch])
    found, _ = run(
        make(name="sgd", clip_norm=None, learning_rate=1.0, warmup_steps=0, accumulation=64, dtype=jnp.bfloat16),
        [batch],
    )
    start, rounded = random_params(), random_params(jnp.bfloat16)
    wanted = np.asarray(exact.params["head"]["bias"]) - np.asarray(start["head"]["bias"])
    moved = np.asarray(found.params["head"]["bias"], np.float32) - np.asarray(rounded["head"]["bias"], np.float32)
    np.testing.assert_allclose(moved, wanted, atol=0.006)


def test_rows_of_weight_zero_change_nothing() -> None:
    batch = random_batch(3, rows=11)
    filled = {name: np.concatenate([value, np.zeros_like(value[:5])]) for name, value in batch.items()}
    odd = {name: np.concatenate([value, random_batch(9)[name][:5]]) for name, value in batch.items()}
    odd["weights"][11:] = 0
    trainer = make(task=WEIGHTED)
    plain, log = run(trainer, [batch] * 4)
    for other in (filled, odd):
        state, log_other = run(trainer, [other] * 4)
        assert_same_course(plain, state, trainer.state.params)
        np.testing.assert_allclose(log[0]["loss"], log_other[0]["loss"], rtol=1e-6)
        assert log[0]["weight"] == pytest.approx(log_other[0]["weight"])


def test_a_batch_of_weight_zero_moves_nothing_but_decay() -> None:
    batch = random_batch(0)
    batch["weights"][:] = 0
    trainer = make(name="sgd", weight_decay=0.0)
    state, log = run(trainer, [batch] * 3)
    assert bits(state.params) == bits(trainer.state.params)
    assert log[-1]["skipped"] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weights", [None, (0.2, 1.0, 3.0)])
def test_loss_is_torch_cross_entropy(smoothing: float, weights: tuple[float, ...] | None) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(32, C)).astype(np.float32) * 4
    labels = rng.integers(0, C, 32)
    task = Task(LABELS, smoothing, weights)
    batch = {"labels": jnp.asarray(labels), "weights": jnp.ones(32)}

    def loss_of(x: jax.Array) -> jax.Array:
        sums = task.sums(lambda batch, key: Output(x, logits=x), batch, None)
        return sums["loss"] / sums["weight"]

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(jnp.asarray(logits))
    theirs = torch.tensor(logits, requires_grad=True)
    weight = None if weights is None else torch.tensor(weights)
    wanted = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels), weight=weight, label_smoothing=smoothing)
    wanted.backward()
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_loss_of_bfloat16_logits_is_float32() -> None:
    logits = jnp.asarray([[300.0, -300.0, 0.0]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.asarray([1]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [600.0], rtol=1e-6)


def test_balanced_class_weights() -> None:
    targets = Targets(LABELS, (10, 20, 30))
    task = make_task(Config(class_weights="balanced"), targets, Network.facts, stand_in_tokenizer())
    assert task.class_weights == pytest.approx((2.0, 1.0, 2 / 3))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_steps_change_nothing(bad: float, accumulation: int) -> None:
    good, spoilt = random_batch(0), random_batch(1)
    spoilt["weights"][3] = bad
    trainer = make(ema=0.9, accumulation=accumulation)
    before, _ = run(trainer, [good] * 3)
    state, log = run(trainer, [good, spoilt, good, spoilt, spoilt, good])
    assert [int(m["skipped"]) for m in log] == [0, 1, 1, 2, 3, 3]
    assert [int(m["streak"]) for m in log] == [0, 1, 0, 1, 2, 0]
    assert int(state.step) == 6
    # Without dropout the skipped steps leave no trace at all: parameters, moments, average and counts have the same bits.
    for name in ("params", "opt_state", "ema"):
        assert bits(getattr(state, name)) == bits(getattr(before, name))
    # The schedule stands still with the optimizer, and what is logged is what is applied.
    rates = [float(m["learning_rate"]) for m in log]
    assert rates == [float(trainer.schedule(count)) for count in (0, 1, 1, 2, 2, 2)]
    assert int(update_count(state.opt_state)) == 3


def test_logged_rate_is_the_applied_one() -> None:
    batches = [random_batch(i) for i in range(20)]
    trainer = make(name="sgd", clip_norm=None, weight_decay=0.0)
    state = jax.tree.map(jnp.copy, trainer.state)
    for step, batch in enumerate(batches):
        before = np.asarray(state.params["head"]["bias"], np.float64)
        gradient = jax.jit(jax.grad(lambda p, b=batch: _mean_loss(p, b)))(state.params)["head"]["bias"]
        gradient = np.asarray(gradient, np.float64)
        state, metrics = trainer.step(state, batch, np.uint32(0))
        rate = float(metrics["learning_rate"])
        assert rate == pytest.approx(float(trainer.schedule(step)), rel=2e-6)  # a cosine outside of jit
        moved = before - np.asarray(state.params["head"]["bias"], np.float64)
        np.testing.assert_allclose(moved, rate * gradient, atol=1e-7)


def _mean_loss(params: Any, batch: dict[str, np.ndarray]) -> jax.Array:
    output = Network().apply({"params": params}, batch["tokens"], batch["mask"], batch["types"], None)
    sums = Task(LABELS).sums(lambda batch, key: output, jax.tree.map(jnp.asarray, batch), None)
    return sums["loss"] / sums["weight"]


def test_ema_follows_its_formula() -> None:
    trainer = make(ema=0.6)
    state = jax.tree.map(jnp.copy, trainer.state)
    average = np.asarray(state.params["layers"]["up"], np.float64)
    for count in range(12):
        state, _ = trainer.step(state, random_batch(count), np.uint32(0))
        decay = min(0.6, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * np.asarray(state.params["layers"]["up"], np.float64)
    np.testing.assert_allclose(np.asarray(state.ema["layers"]["up"]), average, rtol=2e-6, atol=1e-7)
    assert state.best_params is state.ema


def test_dropout_depends_on_seed_and_step_only() -> None:
    trainer = make(rate=0.5)
    batches = [random_batch(i) for i in range(3)]
    assert bits(run(trainer, batches)[0]) == bits(run(trainer, batches)[0])
    assert bits(run(trainer, batches)[0].params) != bits(run(trainer, batches, seed=1)[0].params)
    # The same batch at another step has other bits.
    first, second = (m["loss"] for m in run(make(rate=0.5, learning_rate=0.0), [batches[0]] * 2)[1])
    assert first != second


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_is_donated(dtype: Any) -> None:
    trainer = make(ema=0.9, dtype=dtype)
    state = jax.tree.map(jnp.copy, trainer.state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        new, _ = trainer.step(state, random_batch(0), np.uint32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, trainer.state)


def test_eval_sums_do_not_depend_on_batching() -> None:
    params, task = random_params(), WEIGHTED
    network: Any = Network(0.5)
    step = jax.jit(make_eval_step(network, task))
    batch = random_batch(0, rows=16)
    whole = step(params, batch)
    halves = [step(params, {name: value[i : i + 8] for name, value in batch.items()}) for i in (0, 8)]
    for name in whole[0]:
        np.testing.assert_allclose(whole[0][name], halves[0][0][name] + halves[1][0][name], rtol=1e-6)
    for name in whole[1]:
        np.testing.assert_allclose(whole[1][name], np.concatenate([half[1][name] for half in halves]), rtol=1e-6)


def test_freezing_leaves_bits_alone() -> None:
    trainer = make(freeze=("embed/*", "layers/0/*"), ema=0.9)
    state, _ = run(trainer, [random_batch(i) for i in range(3)])
    start = trainer.state.params
    assert bits(state.params["embed"]) == bits(start["embed"])
    for name, leaf in state.params["layers"].items():
        assert np.asarray(leaf[0]).tobytes() == np.asarray(start["layers"][name][0]).tobytes()
        assert not np.array_equal(leaf[1], start["layers"][name][1])
    assert dataclasses.is_dataclass(state)
