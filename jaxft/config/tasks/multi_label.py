"""Options of the task ``multi_label``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of rows with any number of labels each."""

    HELD_OUT_AT_RANDOM = True
    """Versions without ``data.stratify`` held rows of several labels out whatever these were."""

    separator: str | None = None
    """What stands between the labels of a cell that holds them as one text, for instance ``,``. None: such a text is one label; lists
    need none."""
    threshold: float = 0.5
    """Probability from which on a label is given to a text."""
    focal_gamma: float = 0.0
    """Power of 1 - p that the loss of each decision is multiplied by, p being the probability of what is right (Lin et al. 2017): what
    the model knows already counts less. 0: cross-entropy."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """What the loss of a label counts where a row has it, beside 1 where it has not (torch's ``pos_weight``). ``balanced``: rows without
    the label divided by rows with it. Or a weight per label name; 1 for those that are not named."""

    def __post_init__(self) -> None:
        if self.separator == "":
            raise UserError("task.separator is empty; name what stands between labels, or leave it out")
        if not 0 < self.threshold < 1:
            raise UserError(f"task.threshold={self.threshold}: must lie between 0 and 1")
        if not self.focal_gamma >= 0:
            raise UserError(f"task.focal_gamma={self.focal_gamma}: must not be negative")
