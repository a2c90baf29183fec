"""Options of the task ``token_classification``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of rows whose words have a label each, or whose stretches of characters have one."""

    scheme: Literal["BIO", "BIOES"] = "BIO"
    """How labelled stretches of characters become a label for each word. Rows of words keep the labels that they have."""
    label_pieces: Literal["first", "all"] = "first"
    """Which pieces of a word that the tokenizer splits have its label in training; the first one is scored in any case."""
    focal_gamma: float = 0.0
    """Power of 1 - p that the loss of each word is multiplied by, p being the probability of what is right (Lin et al. 2017): what
    the model knows already counts less. 0: cross-entropy."""

    def __post_init__(self) -> None:
        if not self.focal_gamma >= 0:
            raise UserError(f"task.focal_gamma={self.focal_gamma}: must not be negative")
