"""Ranking of rows by a score, against plain formulas over all pairs and all thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.tasks._ranking import auroc, average_precision, best_cut

rows = st.lists(
    st.tuples(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32), st.booleans()),
    min_size=1,
    max_size=30,
)


def split(table: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s for s, _ in table], np.float32), np.array([p for _, p in table])


@settings(max_examples=200, deadline=None)
@given(rows)
def test_auroc_is_the_share_of_pairs_in_order(table: list[tuple[float, bool]]) -> None:
    pairs = [(a, b) for a, up in table if up for b, other in table if not other]
    found = auroc(*split(table))
    if not pairs:
        assert math.isnan(found)
        return
    assert found == pytest.approx(sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs))


@settings(max_examples=200, deadline=None)
@given(rows)
def test_average_precision_by_its_definition(table: list[tuple[float, bool]]) -> None:
    found, positives = average_precision(*split(table)), sum(up for _, up in table)
    if not positives:
        assert math.isnan(found)
        return
    expected = before = 0.0
    for threshold in sorted({score for score, _ in table}, reverse=True):
        taken = [up for score, up in table if score >= threshold]
        recall = sum(taken) / positives
        expected += (recall - before) * sum(taken) / len(taken)
        before = recall
    assert found == pytest.approx(expected)


@settings(max_examples=200, deadline=None)
@given(rows)
def test_best_cut_gives_the_best_f1(table: list[tuple[float, bool]]) -> None:
    scores, positive = split(table)
    cut = best_cut(scores, positive)
    if not positive.any():
        assert cut is None
        return

    def f1(threshold: float) -> float:
        taken = scores >= np.float32(threshold)
        return 2 * (taken & positive).sum() / (taken.sum() + positive.sum())

    assert cut is not None
    assert f1(cut.threshold) == pytest.approx(cut.f1)
    assert cut.f1 == pytest.approx(max(map(f1, scores.tolist())))
    assert 0 <= cut.threshold <= 1


def test_known_values() -> None:
    # The example of scikit-learn's documentation of both scores.
    scores, positive = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert auroc(scores, positive) == 0.75
    assert average_precision(scores, positive) == pytest.approx(0.8333333333)
    assert best_cut(scores, positive) == (0.3, pytest.approx(0.8))


def test_what_is_no_number_has_no_rank() -> None:
    scores, positive = np.array([0.1, math.nan]), np.array([False, True])
    assert math.isnan(auroc(scores, positive))
    assert math.isnan(average_precision(scores, positive))
    assert best_cut(scores, positive) is None
