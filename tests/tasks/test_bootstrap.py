"""Intervals of scores: as resampling rows one time after the other and scoring them with scikit-learn gives."""

from __future__ import annotations

import numpy as np
import pytest

from jaxft.tasks._bootstrap import intervals_of_classes, intervals_of_ranking


def resampled(score: object, *columns: np.ndarray) -> np.ndarray:
    assert callable(score)
    rng = np.random.default_rng(7)
    draws = (rng.integers(len(columns[0]), size=len(columns[0])) for _ in range(600))
    return np.percentile([score(*(column[rows] for column in columns)) for rows in draws], (2.5, 97.5))


def test_intervals_of_classes_are_those_of_resampled_rows() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    predicted = np.where(rng.random(200) < 0.7, labels, rng.integers(3, size=200))
    found = intervals_of_classes(labels, predicted, 3)
    for name, score in (
        ("accuracy", metrics.accuracy_score),
        ("macro_f1", lambda true, said: metrics.f1_score(true, said, average="macro")),
        ("weighted_f1", lambda true, said: metrics.f1_score(true, said, average="weighted")),
        ("mcc", metrics.matthews_corrcoef),
    ):
        wanted = resampled(score, labels, predicted)
        width = wanted[1] - wanted[0]
        # Two sets of resamples: percentiles of 600 and 1,000 lie about a twentieth of the width apart.
        assert np.abs(np.subtract(found[name], wanted)).max() < 0.15 * width, name
    assert found["micro_f1"] == found["accuracy"]
    assert intervals_of_classes(labels, predicted, 3) == found


def test_intervals_of_ranking_are_those_of_resampled_rows() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    positive = rng.random(200) < 0.3
    scores = (rng.normal(size=200) + positive).round(1)  # with ties
    found = intervals_of_ranking(scores, positive)
    for name, score in (("auroc", metrics.roc_auc_score), ("average_precision", metrics.average_precision_score)):
        wanted = resampled(score, positive, scores)
        width = wanted[1] - wanted[0]
        assert np.abs(np.subtract(found[name], wanted)).max() < 0.15 * width, name


def test_what_cannot_vary_does_not_and_what_is_nothing_has_none() -> None:
    labels = np.array([0, 1, 1, 2])
    assert intervals_of_classes(labels, labels, 3)["accuracy"] == [1, 1]
    assert intervals_of_classes(labels[:0], labels[:0], 3) == {}
    assert intervals_of_ranking(np.arange(4.0), np.ones(4, bool)) == {}
    assert intervals_of_ranking(np.array([np.nan, 1.0]), np.array([True, False])) == {}
