"""Options of the task ``masked_lm``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.masking import Masking


@dataclass(frozen=True)
class Config(Masking):
    """What is hidden of texts, and predicted."""
