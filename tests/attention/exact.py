"""Attention in float64 by numpy, and inputs whose logits float32 holds exactly: at any size, errors are those of a backend alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

LEAST = np.finfo(np.float32).min


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few rows of one value of each axis such that any two values of two axes meet in some row."""
    places = list(itertools.combinations(range(len(axes)), 2))
    wanted = {(i, j, a, b) for i, j in places for a in range(len(axes[i])) for b in range(len(axes[j]))}
    draw, rows = random.Random(0), []
    while wanted:
        i, j, a, b = min(wanted)
        tries = [[draw.randrange(len(axis)) for axis in axes] for _ in range(60)]
        for row in tries:
            row[i], row[j] = a, b
        met = [{(i, j, row[i], row[j]) for i, j in places} & wanted for row in tries]
        best = max(range(len(tries)), key=lambda n: len(met[n]))
        wanted -= met[best]
        rows.append(tuple(axis[at] for axis, at in zip(axes, tries[best], strict=True)))
    return rows


def whole_numbers(heads: tuple[int, int], length: int, size: int = 16) -> list[np.ndarray]:
    """q, k, v and a cotangent of two rows, of whole numbers: sums of products are exact in any order."""
    rng = np.random.default_rng(length)
    shapes = [(2, n, length, size) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [rng.integers(-2, 3, shape).astype(np.float32) for shape in shapes]


def allowed(
    length: int, padding: np.ndarray | None, segments: np.ndarray | None, causal: bool, window: int | None
) -> np.ndarray:
    """[B, 1, S, T]."""
    s, t = np.arange(length)[:, None], np.arange(length)
    seen = np.ones((2, 1, length, length), bool)
    if padding is not None:
        seen &= padding[:, None, None, :]
    if segments is not None:
        seen &= ((segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] != 0))[:, None]
    if causal:
        seen &= s >= t
    return seen if window is None else seen & (abs(s - t) < window)


class Truth:
    """Output and gradients in float64, and for each the sum of the sizes of the terms that it is made of."""

    def __init__(self, arrays: Sequence[np.ndarray], seen: np.ndarray, bias: np.ndarray | None = None) -> None:
        q, k, v, g = (x.astype(np.float64) for x in arrays)
        groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
        logits = q @ k.swapaxes(2, 3) * scale + (0.0 if bias is None else bias.astype(np.float64))
        logits = np.where(seen, logits, -np.inf)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
        self.blind = np.broadcast_to(~np.isfinite(top), q.shape[:3] + (1,))
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        dweights, sizes = g @ v.swapaxes(2, 3), abs(g) @ abs(v).swapaxes(2, 3)
        mean, mean_size = ((weights * x).sum(-1, keepdims=True) for x in (dweights, sizes))
        dlogits, terms = weights * (dweights - mean), weights * (sizes + mean_size)
        self.wanted = self._results(weights, dlogits, q * scale, k, v, g, scale, groups)
        self.sizes = self._results(weights, terms, abs(q) * scale, abs(k), abs(v), abs(g), scale, groups)
        if bias is not None:
            axes = tuple(i for i in (0, 1) if bias.shape[i] == 1)
            self.wanted.append(dlogits.sum(axes, keepdims=True))
            self.sizes.append(terms.sum(axes, keepdims=True))

    @staticmethod
    def _results(weights, dlogits, q, k, v, g, scale: float, groups: int) -> list[np.ndarray]:
        def of_groups(x: np.ndarray) -> np.ndarray:
            return x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2)

        turned = weights.swapaxes(2, 3), dlogits.swapaxes(2, 3)
        return [weights @ v, dlogits @ k * scale, of_groups(turned[1] @ q), of_groups(turned[0] @ g)]

    def check(self, found: Sequence[Any], what: str, tolerance: float = 5e-6) -> None:
        """Raises AssertionError where a result is further off than rounding, or a row that sees nothing is not 0."""
        for name, one, wanted, size in zip(
            ("out", "dq", "dk", "dv", "dbias"), found, self.wanted, self.sizes, strict=False
        ):
            one = np.asarray(one, np.float64)
            assert np.isfinite(one).all(), f"{what}: {name} is not finite"
            off = np.abs(one - wanted).max() / max(size.max(), 1e-300)
            assert off <= tolerance, f"{what}: {name} is off by {off:.1e}"
            if name in ("out", "dq"):
                assert not np.where(self.blind, one, 0.0).any(), f"{what}: {name} of a row that sees nothing"
