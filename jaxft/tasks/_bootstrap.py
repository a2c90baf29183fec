"""Intervals of scores of classes: what other held-out rows of the same kind might have given (Efron 1979), by resampling rows."""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 1000
_SEED = 0
_SHARES = (2.5, 97.5)
_AT_ONCE = 4_000_000  # counts held together


def intervals_of_classes(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, list[float]]:
    """The 2.5th and 97.5th percentile of scores by class over 1,000 resamples of rows; ``{}`` of no rows."""
    rows = len(labels)
    if not rows:
        return {}
    cells, counts = np.unique(labels.astype(np.int64) * classes + predicted, return_counts=True)
    # Rows of one cell are alike, so that drawing rows with replacement is drawing how many of each cell.
    drawn = np.random.default_rng(_SEED).multinomial(rows, counts / rows, RESAMPLES).astype(np.float64)
    of, said = cells // classes, cells % classes
    true, guessed, hits = (
        drawn @ marks for marks in (_marks(of, classes), _marks(said, classes), _hits(of, said, classes))
    )
    both = true + guessed
    f1 = 2 * hits / np.maximum(both, 1)
    right = hits.sum(-1)
    together = right * rows - (true * guessed).sum(-1)
    spread = np.sqrt((rows**2 - np.square(true).sum(-1)) * (rows**2 - np.square(guessed).sum(-1)))
    found = {
        "accuracy": right / rows,
        "macro_f1": f1.sum(-1) / (both > 0).sum(-1),
        "micro_f1": right / rows,
        "weighted_f1": (f1 * true).sum(-1) / rows,
        "mcc": np.where(spread > 0, together / np.where(spread > 0, spread, 1), 0.0),
    }
    return {name: _interval(values) for name, values in found.items()}


def _marks(ids: np.ndarray, classes: int) -> np.ndarray:
    return (ids[:, None] == np.arange(classes)).astype(np.float64)


def _hits(of: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    return _marks(of, classes) * (of == said)[:, None]


def intervals_of_ranking(scores: np.ndarray, positive: np.ndarray) -> dict[str, list[float]]:
    """The same of area under the ROC curve and average precision. Resamples of rows of one class have neither, and are left out; ``{}``
    where a score is NaN or all rows are of one class."""
    rows = len(scores)
    if np.isnan(scores).any() or not 0 < positive.sum() < rows:
        return {}
    values, place = np.unique(-scores, return_inverse=True)
    cells = 2 * place + positive  # from the highest score on: negative rows, positive rows
    generator, areas, precisions = np.random.default_rng(_SEED), list[np.ndarray](), list[np.ndarray]()
    at_once = max(1, _AT_ONCE // rows)
    for first in range(0, RESAMPLES, at_once):
        some = min(at_once, RESAMPLES - first)
        taken = cells[generator.integers(rows, size=(some, rows))] + np.arange(some)[:, None] * 2 * len(values)
        counts = np.bincount(taken.ravel(), minlength=some * 2 * len(values)).reshape(some, len(values), 2)
        counts = counts[(counts.sum(1) > 0).all(-1)].astype(np.float64)
        below, above = counts[..., 0], counts[..., 1].cumsum(-1)
        total, hits = counts.sum(1), counts[..., 1]
        areas.append((below * (above - hits / 2)).sum(-1) / total.prod(-1))
        seen = np.maximum(counts.sum(-1).cumsum(-1), 1)
        precisions.append((hits * above / seen).sum(-1) / total[:, 1])
    found = {"auroc": np.concatenate(areas), "average_precision": np.concatenate(precisions)}
    return {name: _interval(values) for name, values in found.items() if len(values)}


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, _SHARES)
    return [math.nan, math.nan] if math.isnan(low) else [float(low), float(high)]
