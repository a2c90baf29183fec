"""Whether probabilities mean what they say: errors of calibration, and the temperature that would mend them. All in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

BINS = 15
"""Bins of equal width, as in Guo et al. 2017."""
_EDGES = np.linspace(0.0, 1.0, BINS + 1)
_LOWEST, _HIGHEST = (
    0.01,
    100.0,
)  # temperatures beyond are those of rows that have none: all right, or as good as guessed


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [N, C] of logits; NaN where one is not finite."""
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        found = np.exp(logits - logits.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True)


def sigmoid(margins: np.ndarray) -> np.ndarray:
    """Probabilities of logits of yes or no, of any shape."""
    return np.exp(-np.logaddexp(0.0, -margins.astype(np.float64)))


def expected_calibration_error(said: np.ndarray, came: np.ndarray) -> float:
    """The mean over rows of how far the probabilities of their bin are from what came true there (Guo et al. 2017).

    Args:
      said: probabilities [N]; a bin holds those above its lower edge, up to its upper one.
      came: bool [N], whether what had the probability was so.

    Returns:
      NaN of no rows, or where a probability is NaN.
    """
    if not len(said) or np.isnan(said).any():
        return math.nan
    _, means, shares, counts = _binned(said, came)
    return float((counts * np.abs(means - shares)).sum() / len(said))


def reliability(said: np.ndarray, came: np.ndarray) -> list[dict[str, float]]:
    """Each bin that has rows: its edges, its ``rows``, and the means of what was ``said`` and of what ``came`` true."""
    if not len(said) or np.isnan(said).any():
        return []
    which, means, shares, counts = _binned(said, came)
    return [
        {
            "from": float(_EDGES[i]),
            "to": float(_EDGES[i + 1]),
            "said": float(mean),
            "came": float(share),
            "rows": int(count),
        }
        for i, mean, share, count in zip(which, means, shares, counts, strict=True)
    ]


def _binned(said: np.ndarray, came: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which bins have rows; their mean probability, the share that came true, their number of rows."""
    said = said.astype(np.float64)
    place = np.clip(np.searchsorted(_EDGES, said, side="left") - 1, 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    which = np.flatnonzero(counts)
    sums = (np.bincount(place, weights=values, minlength=BINS) for values in (said, came.astype(np.float64)))
    means, shares = (values[which] / counts[which] for values in sums)
    return which, means, shares, counts[which]


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The mean over rows of the squared distance of probabilities [N, C] from 1 at the true class and 0 at the others (Brier 1950): from 0
    to 2, of two classes twice what scikit-learn's ``brier_score_loss`` says. NaN of no rows."""
    if not len(labels):
        return math.nan
    true = probabilities[np.arange(len(labels)), labels]
    return float((np.square(probabilities).sum(-1) - 2 * true + 1).mean())


def temperature_of_classes(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """What logits [N, C] are to be divided by for the least cross-entropy with ``labels`` [N]; None where no temperature from 0.01 to 100
    is it."""
    logits = logits.astype(np.float64)
    true = logits[np.arange(len(labels)), labels]

    def slopes(scale: float) -> tuple[float, float]:
        chances = softmax(scale * logits)
        means = (chances * logits).sum(-1)
        spread = (chances * np.square(logits - means[:, None])).sum(-1)
        return float((means - true).mean()), float(spread.mean())

    return _temperature(slopes, logits)


def temperature_of_labels(margins: np.ndarray, labels: np.ndarray) -> float | None:
    """The same of logits of yes or no and bool ``labels``, both of one shape: the least binary cross-entropy."""
    margins = margins.astype(np.float64)

    def slopes(scale: float) -> tuple[float, float]:
        chances = sigmoid(scale * margins)
        return float(((chances - labels) * margins).mean()), float((chances * (1 - chances) * margins**2).mean())

    return _temperature(slopes, margins)


def _temperature(slopes: Callable[[float], tuple[float, float]], logits: np.ndarray) -> float | None:
    """Newton's method for the scale, 1 / temperature, in which the loss is convex: ``slopes`` gives its first two derivatives. A step out
    of the bracket, which shrinks with every one, is a bisection instead."""
    if not logits.size or not np.isfinite(logits).all():
        return None
    low, high, scale = 1 / _HIGHEST, 1 / _LOWEST, 1.0
    if slopes(low)[0] >= 0 or slopes(high)[0] <= 0:
        return None
    for _ in range(100):
        slope, curve = slopes(scale)
        low, high = (low, scale) if slope > 0 else (scale, high)
        step = scale - slope / curve if curve > 0 else math.inf
        following = step if low < step < high else (low + high) / 2
        if abs(following - scale) <= 1e-12 * scale:
            break
        scale = following
    return 1 / scale
