"""Checkpoints whose tensor names all begin with a wrapper's name, such as DataParallel's ``module.``, without it."""

from __future__ import annotations

import numpy as np

from jaxft.hub.weights.contract import Weights


class WithoutPrefix(Weights):
    """``weights`` as if each name lacked ``prefix``; closing it closes ``weights``."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        """Every name of ``weights`` must begin with ``prefix``."""
        self._weights, self._prefix = weights, prefix
        specs = {name.removeprefix(prefix): weights.spec(name) for name in weights.names()}
        if not all(name.startswith(prefix) for name in weights.names()) or "" in specs:
            raise ValueError(f"{weights.path}: not all names go on after {prefix!r}")
        super().__init__(weights.path, weights.format, specs)

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        self._weights._fill(self._prefix + name, rows, out)

    def close(self) -> None:
        """Closes the files."""
        self._weights.close()
