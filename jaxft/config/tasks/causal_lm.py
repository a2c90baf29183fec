"""Options of the task ``causal_lm``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Following(TaskConfig):
    """How tokens that follow are learnt."""

    z_loss: float = 0.0
    """Added to a token's loss for each square of the log of the sum of its exponentiated logits (Chowdhery et al. 2022: 1e-4), which
    keeps logits from drifting; 0: none. What is told as the loss is without it."""

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss <= 1:
            raise UserError(f"task.z_loss={self.z_loss}: must lie in 0..1")


@dataclass(frozen=True)
class Config(Following):
    """What is learnt of texts."""

    fill_in_the_middle: float = 0.0
    """The share of texts that are read with a stretch of them last, so that the model learns to fill it in between what is before and
    after (Bavarian et al. 2022): half of these prefix, suffix, middle, half suffix, prefix, middle."""
    fill_in_the_middle_tokens: tuple[str, ...] = ()
    """The tokens that begin prefix, middle and suffix. Empty: <|fim_prefix|>, <|fim_middle|>, <|fim_suffix|>, or the same without bars."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fill_in_the_middle <= 1:
            raise UserError(f"task.fill_in_the_middle={self.fill_in_the_middle}: must lie in 0..1")
        if len(set(self.fill_in_the_middle_tokens)) not in (0, 3) or len(self.fill_in_the_middle_tokens) not in (0, 3):
            raise UserError(
                f"task.fill_in_the_middle_tokens={list(self.fill_in_the_middle_tokens)}: name the three that begin prefix, middle "
                "and suffix"
            )
