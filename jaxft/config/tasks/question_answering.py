"""Options of the task ``question_answering``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of questions whose answers are stretches of a context, and how answers are chosen."""

    no_answer: bool = False
    """Whether a question may have no answer in its context (SQuAD v2). Without it, a row without an answer is refused."""
    null_threshold: float = 0.0
    """With ``no_answer``: nothing is answered where the score of that is higher than the best answer's by more than this."""
    n_best: int = 20
    """How many answers of each question are looked at: probabilities are shares among these."""
    max_answer_length: int = 30
    """Tokens that an answer may have."""
    unplaced_answers: Literal["refuse", "first", "skip"] = "refuse"
    """What becomes of answers that do not stand in the context where they are said to, or that occur nowhere or, without a place,
    several times: an error that names the first; ``first`` takes the first of several places; ``skip`` takes none. Rows that are
    left without a place are counted, scored, and not learnt."""

    def __post_init__(self) -> None:
        for name in ("n_best", "max_answer_length"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"task.{name}={value}: must be at least 1")
        if not math.isfinite(self.null_threshold):
            raise UserError(f"task.null_threshold={self.null_threshold}: must be a finite number")
