"""Options of the task ``causal_lm``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """How tokens that follow are learnt."""

    z_loss: float = 0.0
    """Added to a token's loss for each square of the log of the sum of its exponentiated logits (Chowdhery et al. 2022: 1e-4), which
    keeps logits from drifting; 0: none. What is told as the loss is without it."""

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss <= 1:
            raise UserError(f"task.z_loss={self.z_loss}: must lie in 0..1")
