"""From what evaluated batches give to a choice of the best: sums and outputs collected on the host, values compared."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import jax
import numpy as np

from jaxft.data.examples import Split
from jaxft.data.sources.rows import Row
from jaxft.tasks.contract import Batch, Grading, Judging, Remarking, Reporting, ScoringRows, Sums, Task

Arrays = dict[str, np.ndarray]

_AHEAD = 2  # batches that the device may be at work on while an earlier one is fetched


def collected(parts: Iterable[tuple[Sums, Batch]]) -> tuple[Arrays, Arrays]:
    """Sums and outputs of all batches on the host: sums added up in float64, outputs that count (of ``weights`` above 0) one after
    the other.

    Args:
      parts: ``(sums, outputs)`` of each batch; a batch is fetched and folded in soon after it comes, and not kept.
    """
    sums: Arrays = {}
    outputs: dict[str, list[np.ndarray]] = {}
    for added, rows in _fetched(parts):
        for name, value in added.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)
        for name, value in rows.items():
            outputs.setdefault(name, []).append(value[rows["weights"] > 0])
    return sums, {name: np.concatenate(found) for name, found in outputs.items()}


def _fetched(parts: Iterable[tuple[Sums, Batch]]) -> Iterator[tuple[Arrays, Arrays]]:
    waiting: deque[tuple[Sums, Batch]] = deque()
    for part in parts:
        waiting.append(part)
        if len(waiting) > _AHEAD:
            yield jax.device_get(waiting.popleft())
    for part in waiting:
        yield jax.device_get(part)


def scores_rows(task: type[Task] | Task) -> bool:
    """Whether a task's scores need the rows themselves (:class:`~jaxft.tasks.contract.ScoringRows`)."""
    return hasattr(task, "score_rows")


def scores(task: Task, sums: Arrays, outputs: Arrays, rows: Sequence[Row]) -> Mapping[str, object]:
    """The final numbers of a task.

    Args:
      rows: that were evaluated; needed where :func:`scores_rows` says so.
    """
    if scores_rows(task):
        return cast(ScoringRows, task).score_rows(sums, outputs, [row.values for row in rows])
    return task.score(sums, outputs)


def judges(task: Task) -> bool:
    """Whether a task can tell the worst mistakes (:class:`~jaxft.tasks.contract.Grading`)."""
    return hasattr(task, "wrongness") and getattr(task, "judging", True)


def mistakes(
    task: Task, outputs: Mapping[str, np.ndarray], rows: Sequence[Row], order: np.ndarray, most: int
) -> tuple[list[dict[str, object]], int]:
    """The worst mistakes among evaluated rows, the worst first, and how many there are in all.

    Args:
      task: one with :class:`~jaxft.tasks.contract.Judging` and :class:`~jaxft.tasks.contract.Grading`.
      outputs: of all batches.
      order: [examples] the example that each batch's rows were, one after the other.
      most: mistakes that are told.
    """
    wrong, worst = 0, list[tuple[float, int, dict[str, object]]]()
    for number, judged in enumerate(cast(Judging, task).judged(outputs, [row.values for row in rows], order)):
        how = cast(Grading, task).wrongness(judged)
        if how is None:
            continue
        wrong += 1
        # Of equal ones, the first row; numbers differ, so that records are not compared.
        entry = (how, -number, judged)
        if len(worst) < most:
            heapq.heappush(worst, entry)
        else:
            heapq.heappushpop(worst, entry)
    return [judged for *_, judged in sorted(worst, key=lambda one: one[:2], reverse=True)], wrong


def reported(
    task: Task, metrics: Mapping[str, object], outputs: Mapping[str, np.ndarray], *, test: bool = False
) -> Mapping[str, object]:
    """The final numbers of a task, and what else its report has (:class:`~jaxft.tasks.contract.Reporting`).

    Args:
      test: of the rows of a test, which nothing is tuned on.
    """
    if not hasattr(task, "reported"):
        return metrics
    more = cast(Reporting, task).reported(outputs)
    return {**metrics, **{name: value for name, value in more.items() if not (test and name == "thresholds")}}


def remarks(task: Task, split: Split) -> Iterator[str]:
    """What a task has to say of encoded rows (:class:`~jaxft.tasks.contract.Remarking`)."""
    if hasattr(task, "remarks"):
        yield from cast(Remarking, task).remarks(split)


def scalar(scores: Mapping[str, object], metric: str) -> float:
    """The score that a task's ``metrics`` name: a number, whatever else it counts."""
    return cast(float, scores[metric])


def is_better(task: Task, metric: str, value: float, best: float | None) -> bool:
    """Whether a value of a metric is better than the best one so far (None: there is none); one that is not finite never is."""
    if not math.isfinite(value):
        return False
    sign = 1 if task.metrics[metric] == "max" else -1
    return best is None or sign * value > sign * best
