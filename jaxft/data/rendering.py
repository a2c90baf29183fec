"""Examples that are made when they are wanted: decoded, and while training changed at random, as images are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from jaxft.data.batch import Example, Fields
from jaxft.data.examples import Examples


class Rendering(Protocol):
    """How what rows store becomes what batches hold. Called by the threads that read ahead."""

    @property
    def stored(self) -> Fields:
        """What rows store."""
        ...

    @property
    def fields(self) -> Fields:
        """What batches hold."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """How long every example is along the axes of batches that are the same for all."""
        ...

    def rendered(self, example: Example, rng: np.random.Generator | None) -> Example:
        """An example of a batch.

        Args:
          example: as it is stored.
          rng: what it may be changed by at random; None: nothing is left to chance, as where rows are scored.
        """
        ...


def rng_of(seed: int, epoch: int, row: int) -> np.random.Generator:
    """The random numbers of one example: the same on any host, and after a stop."""
    return np.random.default_rng([seed, epoch, row])


def has_lengths(split: Examples) -> bool:
    """Whether examples are texts, which differ in length."""
    return any("length" in field.axes for field in split.fields.values())


def lengths_of(split: Examples) -> np.ndarray:
    """[examples] how many tokens each has; 1 where examples have no tokens."""
    return split.sizes("length") if has_lengths(split) else np.ones(len(split), np.int64)
