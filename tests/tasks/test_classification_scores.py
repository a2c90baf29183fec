"""Scores of one label of several, beside scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxft.tasks.classification import Task


@pytest.mark.parametrize(
    "kind", ["random", "two classes", "one class", "one class said", "a class that is never said", "nothing"]
)
def test_counts_become_the_scores_of_scikit_learn(kind: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng, classes = np.random.default_rng(0), 2 if kind == "two classes" else 5
    true, said = rng.integers(0, classes, (2, 0 if kind == "nothing" else 400))
    if kind == "one class":
        true[:] = 1
    if kind == "one class said":
        said[:] = 1
    if kind == "a class that is never said":
        said[said == 3] = 2
    of = [np.bincount(ids, minlength=classes).astype(float) for ids in (true, said, true[true == said])]
    sums = {
        "true": of[0],
        "predicted": of[1],
        "correct": of[2],
        "loss": np.asarray(1.0),
        "weight": np.asarray(float(len(true))),
    }
    found = Task(tuple("abcde"[:classes])).score(sums)
    names = ("accuracy", "macro_f1", "micro_f1", "weighted_f1", "mcc")
    if kind == "nothing":
        assert all(math.isnan(found[name]) for name in names)
        return
    f1 = {
        f"{how}_f1": metrics.f1_score(true, said, average=how, zero_division=0)
        for how in ("macro", "micro", "weighted")
    }
    expected = {"accuracy": metrics.accuracy_score(true, said), "mcc": metrics.matthews_corrcoef(true, said), **f1}
    assert {name: found[name] for name in names} == pytest.approx(expected, abs=1e-12)


def test_counts_beyond_64_bits_when_squared() -> None:
    many = np.array([2.0**40, 2.0**40])
    sums = {"true": many, "predicted": many, "correct": many, "loss": np.asarray(1.0), "weight": np.asarray(2.0**41)}
    assert Task(("a", "b")).score(sums)["mcc"] == 1
