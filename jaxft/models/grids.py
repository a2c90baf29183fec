"""Tables of positions in two dimensions, resampled to another number of rows and columns, as `torch.nn.functional.interpolate` does it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped


@dataclass(frozen=True)
class Grid:
    """What the second axis of a table [1, places, D] holds: some places that stand alone, then those of a grid, row by row."""

    rows: int
    columns: int
    alone: int
    """How many there are before the grid, which are kept as they are."""
    antialiased: bool = False
    """Smaller grids are smoothed, and the kernel is another one (the reference's ``antialias=True``)."""

    @property
    def places(self) -> int:
        """How many there are in all."""
        return self.alone + self.rows * self.columns

    def resampled(self, table: Shaped[np.ndarray, "1 old D"], old: Grid) -> Float[np.ndarray, "1 places D"]:
        """A table of this grid from one of another: bicubic, edges of pixels aligned, computed in double precision."""
        alone, grid = np.split(np.asarray(table, np.float32), [old.alone], axis=1)
        grid = grid.reshape(old.rows, old.columns, -1)
        down = cubic_weights(old.rows, self.rows, self.antialiased)
        across = cubic_weights(old.columns, self.columns, self.antialiased)
        made = np.einsum("ya,xb,abd->yxd", down, across, grid, optimize=True)
        return np.concatenate([alone, made.reshape(1, -1, made.shape[-1])], axis=1).astype(np.float32)

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"


def cubic_weights(old: int, new: int, antialiased: bool = False) -> Float[np.ndarray, "new old"]:
    """How much of each of ``old`` places each of ``new`` places is made of (Keys 1981).

    Args:
      antialiased: the kernel has a = -0.5 instead of -0.75, is widened where there are fewer new places, and what it has beyond
        the edges is left out; else the places at the edges stand for those beyond.
    """
    # Coordinates as the reference has them, in single precision: they decide which places are looked at.
    scale = np.float32(old) / np.float32(new)
    centres = scale * (np.arange(new, dtype=np.float32) + np.float32(0.5))
    weights, number = np.zeros((new, old)), np.arange(new)
    if not antialiased:
        centres = centres - np.float32(0.5)
        first = np.floor(centres)
        for offset in (-1, 0, 1, 2):
            away = (centres - first).astype(np.float64) - offset
            place = np.clip(first.astype(int) + offset, 0, old - 1)
            np.add.at(weights, (number, place), _cubic(away, -0.75))
        return weights
    wide = max(float(scale), 1.0)
    away = (np.arange(old) + 0.5 - centres[:, None].astype(np.float64)) / wide
    weights = _cubic(away, -0.5)
    return weights / weights.sum(1, keepdims=True)


def _cubic(away: Float[np.ndarray, "*shape"], a: float) -> Float[np.ndarray, "*shape"]:
    """The kernel of cubic convolution; 0 from a distance of 2 on."""
    x = np.abs(away)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))
