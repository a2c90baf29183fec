"""Options of the task ``masked_lm``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is hidden of texts, and predicted."""

    mask_rate: float = 0.15
    """Share of each text's tokens that are predicted."""
    mask_units: Literal["tokens", "words", "spans"] = "tokens"
    """What is hidden together: a token, all pieces of a word, or several words one after the other (Joshi et al. 2019)."""
    span_words: float = 3.0
    """Words of a span, on average: each ends one with the same probability."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise UserError(f"task.mask_rate={self.mask_rate}: must lie between 0 and 1")
        if not 1 <= self.span_words <= 100:
            raise UserError(f"task.span_words={self.span_words}: must lie in 1..100")
