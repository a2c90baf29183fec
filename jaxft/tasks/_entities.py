"""How well tags of words were predicted: entities as a whole, as seqeval scores them by default, and tags one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TypedDict

import numpy as np

from jaxft.data.tagging import entities_of

Sentences = Sequence[Sequence[str]]
Rates = dict[str, float]
"""``precision``, ``recall``, ``f1`` and ``support``."""


class _Averages(TypedDict):
    micro: Rates
    macro: Rates
    weighted: Rates


class EntityScores(_Averages):
    """Scores of entities: averages, and those of each label."""

    labels: dict[str, Rates]


class TokenScores(_Averages):
    """Scores of words: averages, and those of each tag."""

    accuracy: float
    tags: dict[str, Rates]


def entity_scores(true: Sentences, predicted: Sentences) -> EntityScores:
    """Precision, recall and F1 of entities: one is right if its label, its first and its last word are.

    Args:
      true: the tags of each word, sentence by sentence.
      predicted: of the same words.

    Returns:
      ``micro``, ``macro`` and ``weighted``, and ``labels`` by label; each with ``precision``, ``recall``, ``f1`` and ``support`` (the
      number of true entities). The values of seqeval's ``classification_report`` with ``zero_division=0``; all are NaN where there is
      no entity, true or predicted.
    """
    _check(true, predicted)
    # Sentences are parted by a word of no entity, so that places of words are those in the whole.
    found, given = (
        set(entities_of([*chain.from_iterable((*tags, "O") for tags in side)])) for side in (true, predicted)
    )
    labels = sorted({label for label, _, _ in found | given})
    ids = {label: i for i, label in enumerate(labels)}
    right, expected, answered = (
        np.bincount([ids[label] for label, _, _ in entities], minlength=len(labels))
        for entities in (found & given, found, given)
    )
    return {**_averages(right, expected, answered), "labels": _by_name(labels, right, expected, answered)}


def token_scores(true: Sentences, predicted: Sentences, *, outside: str | None = "O") -> TokenScores:
    """How many words have the right tag, and precision, recall and F1 by tag.

    Args:
      true: the tags of each word, sentence by sentence.
      predicted: of the same words.
      outside: a tag that averages leave out, or they would mostly be of words in no entity; None: they are over all tags.

    Returns:
      ``accuracy``; ``micro``, ``macro`` and ``weighted``, and ``tags`` by tag, as in :func:`entity_scores`. NaN where there is nothing
      to be averaged.
    """
    _check(true, predicted)
    ids: dict[str, int] = {}
    expected, given = (
        np.fromiter((ids.setdefault(tag, len(ids)) for tags in side for tag in tags), np.int64)
        for side in (true, predicted)
    )
    names = sorted(ids)
    order = np.array([ids[name] for name in names], np.int64)
    right, of_true, of_predicted = (
        np.bincount(tags, minlength=len(ids))[order] for tags in (expected[expected == given], expected, given)
    )
    kept = np.array([name != outside for name in names], bool)
    return {
        "accuracy": float((expected == given).mean()) if len(expected) else math.nan,
        **_averages(right[kept], of_true[kept], of_predicted[kept]),
        "tags": _by_name(names, right, of_true, of_predicted),
    }


def _check(true: Sentences, predicted: Sentences) -> None:
    if len(true) != len(predicted):
        raise ValueError(f"{len(true)} sentences with true tags, {len(predicted)} with predicted ones")
    for i, (tags, others) in enumerate(zip(true, predicted, strict=True)):
        if len(tags) != len(others):
            raise ValueError(f"sentence {i} has {len(tags)} true tags and {len(others)} predicted ones")


def _rates(right: np.ndarray, expected: np.ndarray, answered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of counts; 0 where there is nothing to divide by."""
    precision, recall = (right / np.maximum(count, 1) for count in (answered, expected))
    total = precision + recall
    return precision, recall, 2 * precision * recall / np.where(total > 0, total, 1)


def _averages(right: np.ndarray, expected: np.ndarray, answered: np.ndarray) -> _Averages:
    """Averages: of all labels together (micro), over labels (macro), and over labels by their share (weighted)."""
    if not len(right):
        nothing = dict.fromkeys(("precision", "recall", "f1"), math.nan) | {"support": 0}
        return {"micro": dict(nothing), "macro": dict(nothing), "weighted": dict(nothing)}
    support = int(expected.sum())
    micro = _rates(right.sum(), expected.sum(), answered.sum())
    rates = _rates(right, expected, answered)
    share = expected / max(support, 1)
    return {
        "micro": _row(micro, support),
        "macro": _row([rate.mean() for rate in rates], support),
        "weighted": _row([(rate * share).sum() for rate in rates], support),
    }


def _by_name(
    names: Sequence[str], right: np.ndarray, expected: np.ndarray, answered: np.ndarray
) -> dict[str, dict[str, float]]:
    rates = _rates(right, expected, answered)
    return {name: _row([rate[i] for rate in rates], expected[i]) for i, name in enumerate(names)}


def _row(rates: Sequence[np.ndarray | np.floating], support: int | np.integer) -> dict[str, float]:
    precision, recall, f1 = map(float, rates)
    return {"precision": precision, "recall": recall, "f1": f1, "support": int(support)}
