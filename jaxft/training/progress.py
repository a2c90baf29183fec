"""What the training loop knows besides the state: the loss since the last line of the log, and the best evaluation so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxft import tasks
from jaxft.config import decode
from jaxft.config.stored import RunMeta, said_by, stored_metric, wrong_best
from jaxft.tasks import Task
from jaxft.training.setup import Note


@dataclass
class Progress:
    """What the loop knows besides the state; stored with each checkpoint."""

    metric: str | None = None
    """Name of the metric that the best value is of."""
    best_value: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    """Evaluations in a row without a better value."""
    loss: float = 0.0
    """Sum over the steps since the last line of the log, those with a finite loss."""
    weight: float = 0.0
    """What that sum is to be divided by."""
    left_out: list[list[int]] = field(default_factory=list)
    """[step, count] of each time that the run went back: so many batches are left out before that of a step."""

    def add(self, loss: float, weight: float) -> None:
        """Counts a step. One without a finite loss changed nothing, and is told by the number of skipped steps."""
        if math.isfinite(loss) and math.isfinite(weight):
            self.loss, self.weight = self.loss + loss, self.weight + weight

    def mean(self) -> float:
        """The mean loss since the last call, NaN if no step had a finite one."""
        mean = self.loss / self.weight if self.weight else math.nan
        self.loss = self.weight = 0.0
        return mean

    def takes(self, task: Task, scores: Mapping[str, object], step: int) -> bool:
        """Whether an evaluation is the best so far, which is noted."""
        assert self.metric is not None
        value = tasks.scalar(scores, self.metric)
        better = tasks.is_better(task, self.metric, value, self.best_value)
        if better:
            self.best_value, self.best_step, self.bad_evals = value, step, 0
        else:
            self.bad_evals += 1
        return better

    def out_of(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row were no better; never for None."""
        return patience is not None and self.bad_evals >= patience


def stored_progress(meta: RunMeta, where: Path, note: Note) -> Progress:
    """The progress in a checkpoint; what an earlier version took for the best by mistake is forgotten.

    Args:
      where: the checkpoint, for messages.

    Raises:
      UserError: it says something else under this name.
    """
    with said_by(where):
        progress = decode(Progress, meta.get("progress", {}), "progress")
    if progress.metric is None:
        wrong = wrong_best(meta["config"])
        progress = Progress() if wrong else progress
        progress.metric = stored_metric(meta)
        if wrong:
            note(f"warning: {wrong}; from here on the best one is kept")
    return progress
