"""Calibration: errors as written out by hand, temperatures as torch finds them, and what reports have of both."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft.models.contract import Output
from jaxft.reporting.report import report_text, write_report
from jaxft.tasks import classification, collected, multi_label, reported
from jaxft.tasks._calibration import (
    expected_calibration_error,
    reliability,
    softmax,
    temperature_of_classes,
    temperature_of_labels,
)

pytestmark = pytest.mark.usefixtures("painted")


def _output(made: Output, batch: Any, key: Any) -> Output:
    return made


def metrics_of(task: Any, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The numbers of a report on logits [N, C], from three batches."""
    parts = []
    for some in np.array_split(np.arange(len(logits)), 3):
        batch = {"labels": jnp.asarray(labels[some], jnp.int32), "weights": jnp.ones(len(some))}
        forward = partial(_output, Output(jnp.zeros((1, 1, 1)), logits=jnp.asarray(logits[some], jnp.float32)))
        parts.append((task.sums(forward, batch, None), task.outputs(forward, batch)))
    sums, outputs = collected(parts)
    return dict(reported(task, task.score(sums, outputs), outputs))


def by_hand(said: np.ndarray, came: np.ndarray) -> float:
    """One bin after the other, as the equation of the paper reads."""
    error = 0.0
    for i in range(15):
        low, high = i / 15, (i + 1) / 15
        inside = [j for j, one in enumerate(said) if low < one <= high]
        if inside:
            accuracy = sum(bool(came[j]) for j in inside) / len(inside)
            confidence = math.fsum(said[j] for j in inside) / len(inside)
            error += len(inside) / len(said) * abs(accuracy - confidence)
    return error


def drawn(classes: int, rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are three times what the labels were drawn from."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)).astype(np.float32)
    labels = np.array([rng.choice(classes, p=one) for one in softmax(logits)])
    return (3 * logits).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_calibration_of_classes_is_that_by_hand(classes: int) -> None:
    logits, labels = drawn(classes)
    metrics = metrics_of(classification.Task(tuple("abcde"[:classes])), logits, labels)
    probabilities = np.exp(torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy())
    expected = by_hand(probabilities.max(-1), probabilities.argmax(-1) == labels)
    assert expected > 0.05
    assert metrics["ece"] == pytest.approx(expected, abs=1e-9)
    brier = np.square(probabilities - np.eye(classes)[labels]).sum(-1).mean()
    assert metrics["brier"] == pytest.approx(brier, abs=1e-9)
    found = metrics["calibration"]
    assert 2 < found["temperature"] < 4
    cooled = np.exp(torch.log_softmax(torch.tensor(logits, dtype=torch.float64) / found["temperature"], -1).numpy())
    assert found["ece_at_temperature"] == pytest.approx(by_hand(cooled.max(-1), cooled.argmax(-1) == labels), abs=1e-9)
    assert found["ece_at_temperature"] < metrics["ece"] / 2
    assert found["brier_at_temperature"] < metrics["brier"]
    assert sum(one["rows"] for one in found["bins"]) == len(labels)


def test_a_threshold_changes_no_calibration() -> None:
    logits, labels = drawn(2)
    usual, other = (metrics_of(classification.Task(("a", "b"), threshold=cut), logits, labels) for cut in (None, 0.95))
    assert usual["accuracy"] != other["accuracy"]
    assert [usual[name] for name in ("ece", "brier", "calibration")] == [
        other[name] for name in ("ece", "brier", "calibration")
    ]


def test_calibration_of_labels_is_that_by_hand() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(200, 4)).astype(np.float32)
    labels = (rng.random((200, 4)) < 1 / (1 + np.exp(-logits))).astype(int)
    metrics = metrics_of(multi_label.Task(tuple("abcd")), 3 * logits, labels)
    chances = 1 / (1 + np.exp(-(3 * logits).astype(np.float32).astype(np.float64)))
    for i, row in enumerate(metrics["classes"].values()):
        assert row["ece"] == pytest.approx(by_hand(chances[:, i], labels[:, i]), abs=1e-9)
        assert row["brier"] == pytest.approx(np.square(chances[:, i] - labels[:, i]).mean(), abs=1e-9)
    assert metrics["macro_ece"] == pytest.approx(
        np.mean([row["ece"] for row in metrics["classes"].values()]), abs=1e-12
    )
    assert 2 < metrics["calibration"]["temperature"] < 4
    assert metrics["calibration"]["macro_ece_at_temperature"] < metrics["macro_ece"]


def test_temperatures_are_where_torch_finds_no_slope() -> None:
    logits, labels = drawn(4)
    margins, marks = logits, np.eye(4)[labels] > 0
    for found, loss, target in (
        (temperature_of_classes(logits, labels), torch.nn.functional.cross_entropy, torch.tensor(labels)),
        (
            temperature_of_labels(margins, marks),
            torch.nn.functional.binary_cross_entropy_with_logits,
            torch.tensor(marks, dtype=torch.float64),
        ),
    ):
        assert found is not None
        temperature = torch.tensor(found, dtype=torch.float64, requires_grad=True)
        loss(torch.tensor(logits, dtype=torch.float64) / temperature, target).backward()
        assert temperature.grad is not None
        assert abs(temperature.grad.item()) < 1e-12


@pytest.mark.parametrize("sign", [1, -1])
def test_rows_that_are_all_right_or_all_wrong_have_no_temperature(sign: int) -> None:
    labels = np.arange(30) % 3
    logits = sign * np.eye(3, dtype=np.float32)[labels]
    assert temperature_of_classes(logits, labels) is None
    assert temperature_of_labels(logits, np.eye(3)[labels] > 0) is None
    found = metrics_of(classification.Task(tuple("abc")), logits, labels)["calibration"]
    assert found["temperature"] is None
    assert set(found) == {"bins", "temperature"}


def test_edges_belong_to_the_bin_below() -> None:
    said = np.array([0.0, 1 / 15, 1 / 15 + 1e-9, 1.0])
    bins = reliability(said, np.array([False, True, True, True]))
    assert [(one["from"], one["rows"]) for one in bins] == [
        (0, 2),
        (pytest.approx(1 / 15), 1),
        (pytest.approx(14 / 15), 1),
    ]
    assert [one["came"] for one in bins] == [0.5, 1, 1]


def test_what_is_no_number_has_no_calibration(tmp_path: Path) -> None:
    assert math.isnan(expected_calibration_error(np.zeros(0), np.zeros(0, bool)))
    logits = np.full((9, 3), np.nan, np.float32)
    logits[:4] = np.inf
    metrics = metrics_of(classification.Task(tuple("abc")), logits, np.zeros(9, int))
    assert math.isnan(metrics["ece"])
    assert metrics["calibration"] == {"bins": [], "temperature": None}
    assert metrics["intervals"] == {}
    assert [path.name for path in write_report(tmp_path, metrics, "abc", [])] == ["metrics.json", "confusion.png"]


def test_very_many_classes_have_an_error_and_no_temperature() -> None:
    labels = tuple(map(str, range(classification.MOST_CONFUSION_CLASSES + 1)))
    rng = np.random.default_rng(0)
    logits, true = rng.normal(size=(40, len(labels))).astype(np.float32) * 4, rng.integers(len(labels), size=40)
    metrics = metrics_of(classification.Task(labels), logits, true)
    chances = softmax(logits)
    assert metrics["ece"] == pytest.approx(by_hand(chances.max(-1), chances.argmax(-1) == true), abs=1e-6)
    assert "brier" not in metrics
    assert set(metrics["calibration"]) == {"bins"}


def test_the_report_draws_and_tells_it(tmp_path: Path) -> None:
    logits, labels = drawn(3)
    metrics = metrics_of(classification.Task(tuple("abc")), logits, labels)
    assert "reliability_test.png" in [path.name for path in write_report(tmp_path, metrics, "abc", [], split="test")]
    assert (tmp_path / "reliability_test.png").read_bytes().startswith(b"\x89PNG")
    text = report_text(metrics, "abc", [], 100)
    found = metrics["calibration"]
    assert f"calibration error {metrics['ece']:.4f}   Brier {metrics['brier']:.4f}" in " ".join(text.split("\n"))
    assert f"Logits divided by {found['temperature']:.3g} would have a calibration error of" in text
