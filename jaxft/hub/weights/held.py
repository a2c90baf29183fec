"""An open checkpoint whose tensors stay in memory once they have been read."""

from __future__ import annotations

import numpy as np

from jaxft.hub.weights.contract import Weights


class Held(Weights):
    """The tensors of ``weights``, each read from its file at most once; the file stays open, for tensors not read yet."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.path, weights.format, {name: weights.spec(name) for name in weights.names()})
        self._weights = weights
        self._held: dict[str, np.ndarray] = {}

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        if name not in self._held:
            self._held[name] = self._weights.read(name)
        out[...] = self._held[name] if rows is None else self._held[name][rows[0] : rows[1]]

    def close(self) -> None:
        """Nothing: what was read is for others to come."""
