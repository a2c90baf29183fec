"""Options of the task ``masked_lm``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is hidden of texts, and predicted."""

    mask_rate: float = 0.15
    """Share of each text's tokens that are predicted."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise UserError(f"task.mask_rate={self.mask_rate}: must lie between 0 and 1")
