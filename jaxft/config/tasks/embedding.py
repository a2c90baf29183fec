"""Options of the task ``embedding``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError

Loss = Literal["ranking", "cosent", "cosine", "triplet", "margin_mse", "distillation"]
NEED_NUMBERS: tuple[Loss, ...] = ("cosent", "cosine", "margin_mse")
"""Losses of rows that have a number each, in the column ``data.label``."""
NEED_NEGATIVES: tuple[Loss, ...] = ("triplet", "margin_mse")
"""Losses of three texts."""


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of texts that belong together, and how a text becomes one vector."""

    loss: Loss = "ranking"
    """``ranking``: each text finds its partner among all of the batch (multiple negatives ranking, InfoNCE). ``cosent``: similarities are
    in the order of the numbers. ``cosine``: they equal the numbers. ``triplet``: the partner is nearer than the negative by a margin.
    ``margin_mse``: by how much it is more similar equals the number. ``distillation``: the vectors of a row's texts are that of the row, a
    teacher's, in the column ``data.label``."""
    scale: float = 20.0
    """What similarities are multiplied with in ``ranking`` and ``cosent``: 1 / temperature."""
    directions: Literal["one", "both"] = "one"
    """``both``: ranking the other way round counts as much, each partner finding its text."""
    duplicates: Literal["mask", "keep", "apart"] = "mask"
    """``mask``: texts of the batch that are right as well, by their very words, are no negatives. ``apart``: rows that share a text are
    put into different batches, and masked where there are too many of them. ``keep``: they are negatives."""
    negatives: tuple[str, ...] = ()
    """Columns of texts that do not belong to the row's text though they look like it: one text each, or a list of texts."""
    negatives_per_row: int | None = None
    """How many of these a row has at most; the first ones count. None: one for each column."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """How ``triplet`` measures."""
    margin: float = 5.0
    """By how much the partner must be nearer in ``triplet``."""
    matryoshka: tuple[int, ...] = ()
    """Widths that vectors may be cut to: the loss is the sum of that at each (Kusupati et al. 2022). Empty: the whole width alone."""
    teacher_width: int | None = None
    """How many numbers the vectors have that ``distillation`` learns: as many as the model's own."""
    pooling: Literal["mean", "cls", "last", "weighted"] | None = None
    """How the vectors of tokens become one: their mean, that of the first or the last token, or the mean weighted by place (1, 2, ...).
    None: as the model's folder says, or their mean."""
    normalize: bool | None = None
    """Whether vectors are given with length 1. None: as the model's folder says, or yes."""
    query_prompt: str | None = None
    """Put before the first text of each row. None: as the model's folder says, or nothing."""
    text_prompt: str | None = None
    """Put before all other texts. None: as the model's folder says, or nothing."""
    embed_as: Literal["text", "query"] = "text"
    """Which of the two prompts ``jaxft predict`` puts before texts that stand alone."""
    at: int = 10
    """How many of the nearest texts count in MRR, NDCG and recall."""

    def __post_init__(self) -> None:
        for name in ("scale", "margin"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"task.{name}={getattr(self, name)}: must be above 0")
        if self.at < 1:
            raise UserError(f"task.at={self.at}: must be at least 1")
        if any(width < 1 for width in self.matryoshka) or len(set(self.matryoshka)) < len(self.matryoshka):
            raise UserError(f"task.matryoshka={list(self.matryoshka)}: must be different widths above 0")
        if len(set(self.negatives)) < len(self.negatives):
            raise UserError(f"task.negatives={list(self.negatives)}: a column is named twice")
        if self.negatives_per_row is not None and (self.negatives_per_row < 1 or not self.negatives):
            raise UserError(
                f"task.negatives_per_row={self.negatives_per_row}: must be at least 1, and task.negatives must name their columns"
            )
        self._check_loss()

    def _check_loss(self) -> None:
        if self.loss in NEED_NEGATIVES and self.most_negatives != 1:
            raise UserError(
                f"task.loss={self.loss} is of three texts: name one column in task.negatives (now {self.most_negatives})"
            )
        if self.loss in ("cosent", "cosine") and self.negatives:
            raise UserError(f"task.loss={self.loss} is of two texts and a number: leave task.negatives out")
        if self.loss == "distillation":
            self._check_distillation()
        elif self.teacher_width is not None:
            raise UserError(
                f"task.teacher_width={self.teacher_width} is of task.loss=distillation, not of {self.loss}; leave it out"
            )
        if self.directions == "both" and self.loss != "ranking":
            raise UserError(f"task.directions=both is of task.loss=ranking, not of {self.loss}; leave it out")

    def _check_distillation(self) -> None:
        if self.teacher_width is None or self.teacher_width < 1:
            raise UserError(
                f"task.teacher_width={self.teacher_width}: task.loss=distillation needs to know how many numbers the teacher's vectors "
                "have (column data.label), for instance task.teacher_width=384"
            )
        if self.negatives:
            raise UserError("task.loss=distillation is of texts and a teacher's vector: leave task.negatives out")
        if self.matryoshka:
            raise UserError(
                f"task.matryoshka={list(self.matryoshka)}: task.loss=distillation learns a teacher's whole vector, whose first numbers "
                "need not mean anything by themselves; leave it out"
            )

    @property
    def most_negatives(self) -> int:
        """Negatives that a row can have."""
        return len(self.negatives) if self.negatives_per_row is None else self.negatives_per_row

    @property
    def texts(self) -> int:
        """Texts that a row can have: its text, the partner, and negatives."""
        return 2 + self.most_negatives
