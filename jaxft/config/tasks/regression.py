"""Options of the task ``regression``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of rows with a number each."""

    loss: Literal["mse", "mae", "huber"] = "mse"
    """What the distance of an answer from the number costs: its square, itself, or half its square up to 1 and linear beyond (Huber
    1964)."""
