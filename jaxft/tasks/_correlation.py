"""How numbers that a model gives go together with those that are right, exactly, over all rows."""

from __future__ import annotations

import math

import numpy as np


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation coefficient of two [N] arrays; NaN of fewer than two rows, where either is constant, and where a value is NaN."""
    if len(x) < 2:
        return math.nan
    # Divided by their largest value first: squares of large numbers overflow, those of small ones vanish.
    a, b = (_centred(np.asarray(values, np.float64)) for values in (x, y))
    spread = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    if spread == 0 or not math.isfinite(spread):
        return math.nan
    return min(1.0, max(-1.0, float(a @ b) / spread))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation coefficient of the ranks of two [N] arrays; equal values share the mean of their ranks."""
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    return pearson(ranks(x), ranks(y))


def ranks(values: np.ndarray) -> np.ndarray:
    """[N] float64 from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _centred(values: np.ndarray) -> np.ndarray:
    if (values == values[0]).all():  # a mean need not be exactly the value that it is of
        return np.zeros_like(values)
    values = values - values.mean()
    return values / (np.abs(values).max() or 1.0)
