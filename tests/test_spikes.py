"""Steps that stand out change nothing, are counted, and leave the course the same bits wherever it is stopped and resumed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_loop import Ready, assert_same_params, digest_of, fit, prepared, stored
from tiny_run import config_of

from jaxft.checkpoint.layout import flatten
from jaxft.config import OptimConfig, load_config
from jaxft.errors import UserError
from jaxft.reporting.sinks import read_log
from jaxft.tasks import Task
from jaxft.training import spikes
from jaxft.training.optim import make_optimizer, make_schedule
from jaxft.training.spikes import WINDOW
from jaxft.training.state import TrainState, init_state
from jaxft.training.step import make_train_step


class Given:
    """A task whose loss and gradient are what the batch says."""

    def prepare(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        return batch

    def weight(self, batch: dict[str, jax.Array]) -> jax.Array:
        return batch["mask"].sum().astype(jnp.float32)


def gradient_of(params: Any, batch: Any, key: Any, weight: Any) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    return [batch["norms"].sum() * jnp.array([0.6, 0.8])], {"loss": batch["losses"].sum() * weight, "weight": weight}


def course(values: np.ndarray, deviations: float = 6.0, mesh: Any = None) -> tuple[list[Any], list[Any]]:
    """The state after each step, and its numbers; a step's (loss, norm) is a row of ``values``."""
    config = OptimConfig(name="adamw", learning_rate=1e-2, clip_norm=None, schedule="constant", warmup_steps=0)
    params: Any = {"head": {"kernel": jnp.ones(2)}}
    schedule = make_schedule(config, len(values))
    optimizer = make_optimizer(config, schedule, params, {"head": {"kernel": ("embed",)}})
    step: Any = jax.jit(make_train_step(cast(Task, Given()), gradient_of, optimizer, schedule, spike_skip=deviations))
    states, log = [init_state(params, optimizer, ema=False, spike_skip=True)], []
    for loss, norm in values:
        rows = {name: np.array([value, 0.0], np.float32) for name, value in (("losses", loss), ("norms", norm))}
        batch: dict[str, Any] = rows | {"mask": np.ones(4, np.int32)}
        if mesh is not None:
            batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("rows")))
        state, metrics = step(states[-1], batch, np.uint32(0))
        states.append(state)
        log.append(jax.device_get(metrics))
    assert step._cache_size() <= 2  # the state before the first step has no mesh
    return states, log


def values_with(seed: int, changes: Mapping[int, tuple[float, float]], length: int = 300) -> np.ndarray:
    """Losses around 2 and norms around 1, but for the given steps."""
    values = np.abs(np.random.default_rng(seed).normal((2.0, 1.0), 0.1, (length, 2))).astype(np.float32)
    for step, row in changes.items():
        values[step] = row
    return values


def judged(values: np.ndarray, deviations: float) -> list[bool]:
    """The same rule in float64, from a list."""
    seen: list[np.ndarray] = []
    found = []
    for row in values.astype(np.float64):
        latest, spike = np.array(seen[-128:]), False
        if np.isfinite(row).all():
            if len(seen) + 1 >= 64:
                spike = bool(np.any(row - latest.mean(0) > deviations * latest.std(0, ddof=1)))
            seen.append(row)
        found.append(spike)
    return found


ODD: Mapping[int, tuple[float, float]] = {
    40: (2.0, 50.0),  # too early to be judged
    100: (np.nan, 1.0),
    110: (2.0, np.inf),
    200: (2.0, 60.0),
    201: (9.0, 1.0),
    230: (0.1, 0.01),  # below the mean
    **dict.fromkeys(range(260, 300), (2.0, 40.0)),  # a lasting rise
}


def test_which_steps_are_left_out_is_what_numpy_says() -> None:
    values = values_with(0, ODD)
    states, log = course(values)
    wanted = judged(values, 6.0)
    assert [int(m["spikes"]) for m in log] == np.cumsum(wanted).tolist()
    assert [step for step, spike in enumerate(wanted) if spike][:2] == [200, 201]
    assert 0 < sum(wanted[260:]) < 8  # a lasting rise is followed
    assert not any(wanted[268:])
    assert int(log[-1]["skipped"]) == 2
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        same = step in (100, 110) or wanted[step]
        for name in ("params", "opt_state"):
            pairs = zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True)
            assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs) == same, (step, name)
    recent = states[-1].recent
    finite = values[np.isfinite(values).all(1)]
    assert int(recent.seen) == len(finite)
    assert sorted(np.asarray(recent.norms)) == pytest.approx(sorted(finite[-WINDOW:, 1]), rel=1e-6)


def test_numbers_too_large_to_be_squared_leave_no_step_out_for_ever() -> None:
    values = values_with(1, {80: (5e37, 1e19)}, length=260)
    states, log = course(values)
    assert [int(log[step]["spikes"]) for step in (79, 80, 259)] == [0, 1, 1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1].params))


def test_devices_agree() -> None:
    values = values_with(2, {90: (2.0, 70.0), 95: (np.nan, 1.0)}, length=100)
    alone, _ = course(values)
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    shared, log = course(values, mesh=mesh)
    assert int(log[-1]["spikes"]) == 1
    for a, b in zip(jax.tree.leaves(alone[-1]), jax.tree.leaves(shared[-1]), strict=True):
        assert all(np.asarray(a).tobytes() == np.asarray(part.data).tobytes() for part in b.addressable_shards)


def test_a_state_without_it_is_what_it_was() -> None:
    state: TrainState = init_state(cast(Any, {"a": jnp.ones(2)}), optax.identity(), ema=False)
    assert sorted(flatten(state)) == ["params/a", "skipped", "step", "streak"]


@pytest.mark.parametrize("value", ["0", "-1", ".nan"])
def test_nonsense_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"^train\.spike_skip"):
        load_config(None, [f"train.spike_skip={value}"])


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    """A run of micro-batches that judges from the tenth step on, and whose batch 21 has gradients a thousand times too large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "_FIRST", 10)
        more = (
            "train.spike_skip=12",
            "train.accumulation=2",
            "train.log_every=1",
            "eval.every=10",
            "checkpoint.keep=99",
        )
        ready = prepared(config_of(tmp_path_factory.mktemp("spikes"), *more), 1, patch)
        yield dataclasses.replace(ready, programs=dataclasses.replace(ready.programs, train=_huge(ready)))


def _huge(ready: Ready) -> dict[Any, Any]:
    bad = digest_of(ready.setup.train_batches(0)[20])

    def call(program: Any, state: Any, batch: Any, seed: Any) -> Any:
        if digest_of(batch) == bad:  # weights that all but cancel out divide by next to nothing
            batch = batch | {"weights": jnp.asarray([1e4, -1e4, *[1.0] * (len(batch["weights"]) - 2)])}
        return program(state, batch, seed)

    return {shape: lambda *a, p=program: call(p, *a) for shape, program in ready.programs.train.items()}


def test_a_run_leaves_a_spike_out_and_goes_on(skipping: Ready, tmp_path: Path) -> None:
    whole = fit(skipping, tmp_path / "whole")
    log = [line for line in read_log(tmp_path / "whole" / "log.jsonl") if line["kind"] == "train"]
    assert [line["spikes"] for line in log] == [0] * 20 + [1] * 10
    assert log[-1]["skipped"] == 0

    parts = tmp_path / "parts"
    for stop in (15, 21, 22):
        assert fit(skipping, parts, stop_at=stop).result.interrupted
    resumed = fit(skipping, parts)
    assert (parts / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert_same_params(resumed.result.params, whole.result.params)
    assert_same_params(*(stored(skipping, out, 30)[0] for out in (parts, tmp_path / "whole")))

    before, after, then = (stored(skipping, parts, step)[0] for step in (20, 21, 22))
    for name in ("params", "opt_state", "ema"):
        assert_same_params(getattr(before, name), getattr(after, name))
    assert int(after.recent.seen) == 21
    assert not np.array_equal(*(jax.tree.leaves(state.params)[0] for state in (after, then)))

    for other in (None, 5.0):
        with pytest.raises(UserError, match=r"train\.spike_skip was 12\.0, now (None|5\.0); give the old value"):
            fit(skipping.but(train={"spike_skip": other}), parts)
