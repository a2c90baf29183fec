"""Options of the task ``preference``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of pairs of replies, one better than the other."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """What is lost by the margin m, by how much more the model prefers the better reply than the reference does, in nats. ``sigmoid``:
    -log sigmoid(beta m) (DPO, Rafailov et al. 2023). ``hinge``: max(0, 1 - beta m) (SLiC, Zhao et al. 2023). ``ipo``:
    (m - 1 / (2 beta))^2, of the means over the tokens of each reply (IPO, Azar et al. 2023)."""
    beta: float = 0.1
    """How much a nat counts: the larger, the nearer the model stays to the reference."""
    label_smoothing: float = 0.0
    """How often the better reply is taken to be the other one, with the loss ``sigmoid`` (conservative DPO, Mitchell 2023)."""
    prompt: str | None = None
    """The column of prompts. None: the replies hold it, whatever the two of a row begin with alike."""
    reference: Literal["columns", "none"] = "columns"
    """``columns``: rows hold the log-probabilities of their replies under the reference, as ``jaxft score`` adds them. ``none``: there is
    no reference, as if all replies were equally probable under it."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"task.beta={self.beta}: must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"task.label_smoothing={self.label_smoothing}: must lie in 0..0.5, 0.5 excluded")
        if self.label_smoothing and self.loss != "sigmoid":
            raise UserError(
                f"task.label_smoothing={self.label_smoothing} is of task.loss=sigmoid, not of {self.loss}; leave it out"
            )
