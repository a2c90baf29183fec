"""How well one number per row ranks the rows of a class before all others, exactly, over all rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Cut(NamedTuple):
    """A threshold on a probability, and the F1 of the class when rows at or above it are given to the class."""

    threshold: float
    f1: float


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of (positive, negative) pairs of rows that ``scores`` [N] puts in the right order, ties counting half.

    That is the area under the ROC curve (Hanley and McNeil 1982). ``positive`` is [N] bool. NaN where there is no such pair, or
    a score is NaN.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives or np.isnan(scores).any():
        return math.nan
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # from 1; rows with one score share the mean of their ranks
    above = float(ranks[place][positive].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """The sum over thresholds of precision times gain in recall, as scikit-learn's ``average_precision_score``.

    NaN where there is no positive row, or a score is NaN.
    """
    if not positive.any() or np.isnan(scores).any():
        return math.nan
    _, hits, taken = _cuts(scores, positive)
    gained = np.diff(hits, prepend=0) / positive.sum()
    return float((gained * hits / taken).sum())


def best_cut(probabilities: np.ndarray, positive: np.ndarray) -> Cut | None:
    """The threshold of the highest F1, in as few digits as part the rows the same way; None without a positive row.

    Of several, the highest threshold.
    """
    if not positive.any() or np.isnan(probabilities).any():
        return None
    values, hits, taken = _cuts(probabilities, positive)
    f1 = 2 * hits / (taken + positive.sum())
    best = int(f1.argmax())
    below = float(values[best + 1]) if best + 1 < len(values) else 0.0
    return Cut(_short_between(below, float(values[best])), float(f1[best]))


def _cuts(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores from the highest on; positive rows and all rows at or above each."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return ordered[last], np.cumsum(positive[order])[last], last + 1


def _short_between(below: float, top: float) -> float:
    """A number of few digits above ``below`` and at most ``top``, in float32 too."""
    for digits in range(1, 9):
        cut = math.floor(top * 10**digits) / 10**digits
        if below < np.float32(cut) <= top:
            return cut
    return top
