"""Options of the task ``reranking``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of pairs of a query and a passage that answers it, or does not."""

    at: int = 10
    """How many passages of a query count in MRR, NDCG and recall, best first."""
    positive_weight: float = 1.0
    """What the loss of a passage that answers counts beside that of one that does not."""

    def __post_init__(self) -> None:
        if self.at < 1:
            raise UserError(f"task.at={self.at}: must be at least 1")
        if not 0 < self.positive_weight < float("inf"):
            raise UserError(f"task.positive_weight={self.positive_weight}: must be above 0")
