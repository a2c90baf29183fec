"""Scores of entities and tags, against seqeval and scikit-learn."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.tasks._entities import entity_scores, token_scores

Sentences = list[list[str]]

metrics: Any = seqeval.metrics  # its annotations are not what it takes
precision_recall_fscore_support: Any = sklearn.metrics.precision_recall_fscore_support

_PLAIN = ["O", "O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
_TEXT = """
O B-PER I-PER E-PER S-PER I-LOC E-LOC B-MISC-x I-MISC-x B I B- I- X XY NN . _ - B_X ü-X
"""
_ODD = [str(tag) for tag in _TEXT.split()]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Sentences, Sentences]:
    """True and predicted tags; some predictions are mostly right, and some sentences have no word."""
    tags = st.sampled_from(draw(st.sampled_from([_PLAIN, _ODD])))
    true = draw(st.lists(st.lists(tags, max_size=8), max_size=4))
    flip = st.booleans() if draw(st.booleans()) else st.just(True)
    predicted = [[draw(tags) if draw(flip) else tag for tag in sentence] for sentence in true]
    return true, predicted


def row(report: Any) -> dict[str, float]:
    return {
        "precision": report["precision"],
        "recall": report["recall"],
        "f1": report["f1-score"],
        "support": report["support"],
    }


@settings(max_examples=250)
@given(pairs())
def test_entities_are_scored_as_by_seqeval(pair: tuple[Sentences, Sentences]) -> None:
    true, predicted = pair
    found = entity_scores(true, predicted)
    if not found["labels"]:
        assert all(math.isnan(found[name]["f1"]) for name in ("micro", "macro", "weighted"))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tags without a prefix
        report = metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
        for name in ("micro", "macro", "weighted"):
            assert found[name] == pytest.approx(row(report.pop(f"{name} avg")), abs=1e-12)
        scores = (metrics.precision_score, metrics.recall_score, metrics.f1_score)
        assert [found["micro"][name] for name in ("precision", "recall", "f1")] == pytest.approx(
            [score(true, predicted, zero_division=0) for score in scores], abs=1e-12
        )
    assert list(found["labels"]) == list(report)
    for label, scored in report.items():
        assert found["labels"][label] == pytest.approx(row(scored), abs=1e-12)


@settings(max_examples=80)
@given(pairs(), st.sampled_from(["O", None]))
def test_tags_are_scored_as_by_scikit_learn(pair: tuple[Sentences, Sentences], outside: str | None) -> None:
    true, predicted = pair
    found = token_scores(true, predicted, outside=outside)
    expected, given_tags = ([tag for sentence in side for tag in sentence] for side in pair)
    if not expected:
        assert math.isnan(found["accuracy"])
        assert found["tags"] == {}
        return
    assert found["accuracy"] == pytest.approx(np.mean(np.array(expected) == np.array(given_tags)), abs=1e-12)
    names = sorted({*expected, *given_tags})
    by_tag = precision_recall_fscore_support(expected, given_tags, labels=names, average=None, zero_division=0)
    assert list(found["tags"]) == names
    for name, *values in zip(names, *by_tag, strict=True):
        assert list(found["tags"][name].values()) == pytest.approx(values, abs=1e-12)
    kept = [name for name in names if name != outside]
    for average in ("micro", "macro", "weighted"):
        if not kept:
            assert math.isnan(found[average]["f1"])
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = precision_recall_fscore_support(
                expected, given_tags, labels=kept, average=average, zero_division=0
            )[:3]
        assert list(found[average].values())[:3] == pytest.approx(values, abs=1e-12)


def test_scores_of_nothing() -> None:
    for nothing in ([], [[]], [["O", "O"]]):
        found = entity_scores(nothing, nothing)
        assert math.isnan(found["micro"]["precision"])
        assert found["micro"]["support"] == 0
        assert found["labels"] == {}
    # What was found where there is nothing is wrong.
    assert entity_scores([["O"]], [["B-X"]])["micro"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert entity_scores([["B-X"]], [["O"]])["labels"]["X"] == {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "support": 1,
    }


def test_sentences_must_match() -> None:
    for scores in (entity_scores, token_scores):
        with pytest.raises(ValueError, match="2 sentences with true tags, 1 with predicted ones"):
            scores([["O"], ["O"]], [["O"]])
        with pytest.raises(ValueError, match="sentence 1 has 2 true tags and 1 predicted ones"):
            scores([["O"], ["O", "O"]], [["O"], ["O"]])


def test_entities_do_not_go_on_in_the_next_sentence() -> None:
    true = [["B-X", "I-X"], ["I-X", "O"]]
    assert entity_scores(true, true)["micro"]["support"] == 2


def test_scores_of_many_words_take_no_time() -> None:
    rng = np.random.default_rng(0)
    tags = np.array(["O", "O", "O", "O", "B-X", "I-X", "B-Y", "I-Y", "B-Z", "I-Z"])
    true, predicted = ([[str(tag) for tag in row] for row in tags[rng.integers(0, 10, (10_000, 20))]] for _ in range(2))
    begin = time.process_time()
    entity_scores(true, predicted)
    token_scores(true, predicted)
    assert time.process_time() - begin < 5  # 0.5 s when idle
