"""The focal loss against its formula in torch, values and gradients, of classes, decisions and words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import load_config
from jaxft.errors import UserError
from jaxft.models.contract import Output
from jaxft.tasks import classification, multi_label, token_classification

C = 3
NAMES = ("a", "b", "c")
WEIGHTS = (0.2, 1.0, 3.0)
GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]


def of_batch(task: Any, batch: dict[str, Any]) -> Callable[[jax.Array], jax.Array]:
    def loss(logits: jax.Array) -> jax.Array:
        sums = task.sums(lambda batch, key: Output(logits, logits=logits), jax.tree.map(jnp.asarray, batch), None)
        return sums["loss"] / sums["weight"]

    return loss


def check(task: Any, batch: dict[str, Any], logits: np.ndarray, formula: Callable[[Any], Any]) -> None:
    torch = pytest.importorskip("torch")
    loss, gradient = jax.jit(jax.value_and_grad(of_batch(task, batch)))(jnp.asarray(logits))
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    wanted = formula(theirs)
    wanted.backward()
    np.testing.assert_allclose(loss, wanted.item(), rtol=2e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_classes(gamma: float, weights: tuple[float, ...] | None, smoothing: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(32, C)).astype(np.float32) * 4, rng.integers(0, C, 32)
    task = classification.Task(NAMES, smoothing, weights, focal_gamma=gamma)
    counted = (np.arange(32) < 30).astype(np.float32)  # two rows of padding

    def formula(x: Any) -> Any:
        alpha = torch.tensor(weights or (1.0,) * C, dtype=torch.float64)
        target = (1 - smoothing) * torch.nn.functional.one_hot(torch.tensor(labels), C) + smoothing / C
        p = x.softmax(-1)
        rows = -(target * alpha * (1 - p) ** gamma * x.log_softmax(-1)).sum(-1)
        return rows[:30].sum() / alpha[torch.tensor(labels[:30])].sum()

    check(task, {"labels": labels, "weights": counted}, logits, formula)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_of_decisions(gamma: float, weights: tuple[float, ...] | None) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(20, C)).astype(np.float32) * 4, rng.integers(0, 2, (20, C))
    task = multi_label.Task(NAMES, weights, focal_gamma=gamma)

    def formula(x: Any) -> Any:
        y, alpha = torch.tensor(labels), torch.tensor(weights or (1.0,) * C, dtype=torch.float64)
        p = x.sigmoid()
        yes, no = -((1 - p) ** gamma) * torch.log(p), -(p**gamma) * torch.log(1 - p)
        return (alpha * y * yes + (1 - y) * no).mean()

    check(task, {"labels": labels, "weights": np.ones(20, np.float32)}, logits, formula)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_of_words(gamma: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(4, 6, C)).astype(np.float32) * 4, rng.integers(-1, C, (4, 6))
    task = token_classification.Task(NAMES, focal_gamma=gamma)

    def formula(x: Any) -> Any:
        there = torch.tensor(labels >= 0)
        chosen = torch.tensor(labels).clamp(min=0)[..., None]
        p, logp = (v.gather(-1, chosen)[..., 0][there] for v in (x.softmax(-1), x.log_softmax(-1)))
        return -((1 - p) ** gamma * logp).mean()

    check(task, {"labels": labels, "weights": np.ones(4, np.float32)}, logits, formula)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("size", [20.0, 100.0, 1e4])
def test_what_is_sure_has_finite_gradients(gamma: float, size: float) -> None:
    """(1 - p)^gamma has no slope where p rounds to 1; what is surely wrong counts as in the cross-entropy."""
    logits = jnp.asarray([[size, 0.0, 0.0], [0.0, size, 0.0]])
    batch = {"labels": np.array([0, 2]), "weights": np.ones(2, np.float32)}
    loss, gradient = jax.jit(jax.value_and_grad(of_batch(classification.Task(NAMES, focal_gamma=gamma), batch)))(logits)
    np.testing.assert_allclose(loss, size / 2, rtol=1e-4)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [0, 0.5, -0.5]], atol=1e-3)
    marks = {"labels": np.array([[1, 0, 1], [0, 0, 0]]), "weights": np.ones(2, np.float32)}
    loss, gradient = jax.jit(jax.value_and_grad(of_batch(multi_label.Task(NAMES, focal_gamma=gamma), marks)))(logits)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[1, 1], 1 / 6, rtol=1e-3)


@pytest.mark.parametrize("name", ["classification", "multi_label", "token_classification"])
def test_without_gamma_the_program_is_the_one_without_the_option(name: str) -> None:
    module: Any = {"classification": classification, "multi_label": multi_label}.get(name, token_classification)
    shape = (2, 4, C) if name == "token_classification" else (2, C)
    labels = np.zeros(shape if name == "multi_label" else shape[:-1], np.int32)
    batch = {"labels": labels, "weights": np.ones(2, np.float32)}
    texts = [
        str(jax.make_jaxpr(of_batch(module.Task(NAMES, **how), batch))(jnp.ones(shape)))
        for how in ({}, {"focal_gamma": 0.0})
    ]
    assert texts[0] == texts[1]
    assert "expm1" not in texts[0]


@pytest.mark.parametrize("name", ["classification", "multi_label", "token_classification"])
@pytest.mark.parametrize("value", ["-0.5", ".nan", ".inf", "soft"])
def test_no_other_gamma(name: str, value: str) -> None:
    with pytest.raises(UserError, match="focal_gamma") as caught:
        load_config(None, [f"task.name={name}", f"task.focal_gamma={value}"])
    assert "\n" not in str(caught.value)
