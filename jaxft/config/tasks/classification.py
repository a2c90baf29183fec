"""Options of the task ``classification``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of rows with one label each."""

    label_smoothing: float = 0.0
    """Share of the target probability spread evenly over all classes (Szegedy et al. 2016)."""
    focal_gamma: float = 0.0
    """Power of 1 - p that the loss of each row is multiplied by, p being the probability of what is right (Lin et al. 2017): what
    the model knows already counts less. 0: cross-entropy."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """``balanced``: N / (C * count of the class in the training data). Or a weight per label name."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing={self.label_smoothing}: must lie in 0..1")
        if not self.focal_gamma >= 0:
            raise UserError(f"task.focal_gamma={self.focal_gamma}: must not be negative")
