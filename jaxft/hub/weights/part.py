"""An open checkpoint as if it had only some of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxft.hub.weights.contract import Weights


class Part(Weights):
    """The tensors of ``weights`` but those named in ``without``; closing it closes ``weights``."""

    def __init__(self, weights: Weights, without: Iterable[str]) -> None:
        left = {name: weights.spec(name) for name in weights.names() if name not in set(without)}
        super().__init__(weights.path, weights.format, left)
        self._weights = weights

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        self._weights._fill(name, rows, out)

    def close(self) -> None:
        """Closes the files."""
        self._weights.close()
