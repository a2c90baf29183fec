"""Options of the task ``multiple_choice``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of questions with answers to choose from."""

    choices: tuple[str, ...] = ("choices",)
    """Columns of the answers to choose from: one text each, or a list of texts."""
    most_choices: int | None = None
    """How many a question can have; one that has fewer costs less. None: one for each column, or 4 of a single column."""

    def __post_init__(self) -> None:
        if not self.choices or len(set(self.choices)) < len(self.choices):
            raise UserError(f"task.choices={list(self.choices)}: name each column of answers once")
        if self.most < 2:
            raise UserError(f"task.most_choices={self.most_choices}: must be at least 2")

    @property
    def most(self) -> int:
        """Answers that a row can have."""
        if self.most_choices is not None:
            return self.most_choices
        return len(self.choices) if len(self.choices) > 1 else 4
