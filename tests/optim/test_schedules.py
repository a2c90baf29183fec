"""Schedules against transformers' and against their formulas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import OptimConfig
from jaxft.errors import UserError
from jaxft.training.optim.schedules import make_schedule, warmup_steps_of

TOTAL = 50
PEAK = 3e-3


def curve(total: int = TOTAL, **settings: Any) -> np.ndarray:
    defaults: dict[str, Any] = {"learning_rate": PEAK}
    schedule = make_schedule(OptimConfig(**(defaults | settings)), total)
    return np.array([schedule(step) for step in range(total)])


def reference(name: str, warmup: int, **settings: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = getattr(optimization, name)(optimizer, num_warmup_steps=warmup, **settings)
    rates = []
    for _ in range(TOTAL):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize("warmup", [0, 1, 7, TOTAL - 1])
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        ({"schedule": "constant"}, "get_constant_schedule_with_warmup", {}),
        ({"schedule": "linear"}, "get_linear_schedule_with_warmup", {"num_training_steps": TOTAL}),
        ({"schedule": "cosine"}, "get_cosine_schedule_with_warmup", {"num_training_steps": TOTAL}),
        (
            {"schedule": "cosine", "end_factor": 0.1},
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": TOTAL, "min_lr_rate": 0.1},
        ),
        (
            {"schedule": "polynomial", "power": 3.0, "end_factor": 0.01},
            "get_polynomial_decay_schedule_with_warmup",
            {"num_training_steps": TOTAL, "lr_end": PEAK * 0.01, "power": 3.0},
        ),
        ({"schedule": "inverse_sqrt"}, "get_inverse_sqrt_schedule", {}),
        (
            {"schedule": "warmup_stable_decay", "end_factor": 0.2, "decay_fraction": 0.3},
            "get_wsd_schedule",
            {"num_training_steps": TOTAL, "num_decay_steps": 15, "decay_type": "linear", "min_lr_ratio": 0.2},
        ),
    ],
)
def test_schedule_equals_transformers(ours: dict[str, Any], theirs: str, settings: dict[str, Any], warmup: int) -> None:
    if ours["schedule"] == "inverse_sqrt" and warmup == 0:
        settings = {"timescale": 1}  # the documented difference
    if ours["schedule"] == "warmup_stable_decay":
        warmup = min(warmup, 35)
    if theirs == "get_wsd_schedule":
        # Theirs rises from min_lr_ratio, ours from 0 as all others do: compare after the warm-up.
        expected = reference(theirs, warmup, **settings)[warmup:]
        np.testing.assert_allclose(curve(warmup_steps=warmup, **ours)[warmup:], expected, rtol=2e-5, atol=PEAK * 1e-6)
        return
    expected = reference(theirs, warmup, **settings)
    np.testing.assert_allclose(curve(warmup_steps=warmup, **ours), expected, rtol=2e-5, atol=PEAK * 1e-6)


def test_warmup_may_fill_the_run() -> None:
    np.testing.assert_allclose(curve(warmup_steps=TOTAL), PEAK * np.arange(TOTAL) / TOTAL, rtol=1e-6)


def test_step_drops_at_shares_of_the_run() -> None:
    rates = curve(100, schedule="step", warmup_steps=10, step_fractions=(0.5, 0.75), step_factor=0.1) / PEAK
    np.testing.assert_allclose(rates[:10], np.arange(10) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[[10, 49, 50, 74, 75, 99]], [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)


def test_step_drops_that_fall_together_both_apply() -> None:
    rates = curve(3, schedule="step", warmup_steps=0, step_fractions=(0.6, 0.7), step_factor=0.5) / PEAK
    np.testing.assert_allclose(rates, [1, 1, 0.25], rtol=1e-6)


def test_exponential_by_formula() -> None:
    steps = np.arange(TOTAL)
    rates = curve(schedule="exponential", warmup_steps=0, step_factor=0.5, exponential_steps=20, end_factor=0.3) / PEAK
    np.testing.assert_allclose(rates, np.maximum(0.5 ** (steps / 20), 0.3), rtol=1e-5)
    half = curve(schedule="exponential", warmup_steps=0, step_factor=0.5) / PEAK
    np.testing.assert_allclose(half, 0.5 ** (steps / (TOTAL / 2)), rtol=1e-5)


def test_inverse_sqrt_is_continuous() -> None:
    rates = curve(schedule="inverse_sqrt", warmup_steps=16) / PEAK
    np.testing.assert_allclose(rates[[15, 16, 48]], [15 / 16, 1, (16 / 48) ** 0.5], rtol=1e-5)
    np.testing.assert_allclose(curve(schedule="inverse_sqrt", warmup_steps=0)[3] / PEAK, 0.5, rtol=1e-5)


@pytest.mark.parametrize("schedule", [
    "constant", "linear", "cosine", "polynomial", "step", "exponential", "inverse_sqrt", "warmup_stable_decay",
])  # fmt: skip
def test_int_numpy_array_and_traced_steps_agree(schedule: Any) -> None:
    rate = make_schedule(OptimConfig(schedule=schedule, learning_rate=PEAK), TOTAL)
    whole = rate(np.arange(TOTAL + 5))
    assert whole.dtype == jnp.float32
    assert np.isfinite(whole).all()
    for step in (0, 1, 5, 6, 30, TOTAL - 1, TOTAL, TOTAL + 4):
        for form in (step, np.int64(step), jnp.asarray(step)):
            np.testing.assert_allclose(rate(form), whole[step], rtol=1e-6, atol=1e-12)
        traced = jax.jit(rate)(step)
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(traced, whole[step], rtol=1e-6, atol=1e-9)
    assert float(whole[:TOTAL].max()) == pytest.approx(PEAK)


def test_warmup_fraction_rounds_up_and_leaves_a_step() -> None:
    assert warmup_steps_of(OptimConfig(warmup_fraction=0.1), 41) == 5
    assert warmup_steps_of(OptimConfig(warmup_fraction=0.1), 1) == 0
    assert warmup_steps_of(OptimConfig(warmup_fraction=1.0), 10) == 9
    assert warmup_steps_of(OptimConfig(warmup_fraction=0.5, warmup_steps=3), 10) == 3
    assert curve(1)[0] == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 51}, r"optim.warmup_steps=51: longer than the whole run of 50 steps"),
        ({"end_factor": 1.5}, r"optim.end_factor=1.5"),
        ({"schedule": "polynomial", "power": 0.0}, r"optim.power=0.0"),
        ({"schedule": "step", "step_fractions": (0.7, 0.5)}, r"optim.step_fractions=\[0.7, 0.5\]: must rise"),
        ({"schedule": "step", "warmup_fraction": 0.6}, r"the drop at step 25 of 50 comes before"),
        ({"schedule": "step", "step_factor": 1.0}, r"optim.step_factor=1.0"),
        ({"schedule": "exponential", "exponential_steps": 0}, r"optim.exponential_steps=0"),
        ({"schedule": "warmup_stable_decay", "warmup_steps": 46}, r"5 steps of decay do not fit beside 46"),
    ],
)
def test_impossible_schedules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        curve(**settings)


def test_no_steps_is_refused() -> None:
    with pytest.raises(UserError, match="a run has at least 1"):
        make_schedule(OptimConfig(), 0)
