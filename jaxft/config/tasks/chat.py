"""Options of the task ``chat``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.tasks import causal_lm


@dataclass(frozen=True)
class Config(causal_lm.Following):
    """How replies are learnt."""
