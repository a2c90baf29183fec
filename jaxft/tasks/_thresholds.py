"""From which probability on a label is given: the thresholds of the highest F1 on some rows, and those stored with a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxft.data.thresholds import read_thresholds
from jaxft.files import JsonObject
from jaxft.tasks._ranking import best_cut
from jaxft.tasks.contract import Note


def tuned(chances: np.ndarray, true: np.ndarray, labels: Sequence[str]) -> JsonObject:
    """What a report says of thresholds: for each of the labels the one of the highest F1 among all cuts between two different
    probabilities, that F1, and the F1 from 0.5 on; of several such cuts, the highest.

    A label without a row that has it, or whose probabilities are NaN, has no threshold: None.

    Args:
      chances: float32 probabilities [N, C] as the model's program gives them.
      true: bool [N, C].
      labels: names of the C labels.
    """
    table: dict[str, JsonObject] = {}
    for name, said, came in zip(labels, chances.T, true.T, strict=True):
        cut, usual = best_cut(said, came), f1_from(said, came, 0.5)
        table[name] = {
            "threshold": None if cut is None else cut.threshold,
            "f1": usual if cut is None else cut.f1,
            "f1_at_half": usual,
            "rows": int(came.sum()),
        }
    means = {f"macro_{key}": float(np.mean([row[key] for row in table.values()])) for key in ("f1", "f1_at_half")}
    return {"labels": table, **means, "rows": len(true), "tuned_on_these_rows": True}


def f1_from(chances: np.ndarray, true: np.ndarray, threshold: float) -> float:
    """F1 of what is given from a threshold on; 0 where nothing is there and nothing given."""
    said = chances >= np.float32(threshold)
    return float(2 * (said & true).sum() / max(int(said.sum()) + int(true.sum()), 1))


def stored(folder: Path, labels: Sequence[str], of: Sequence[str], usual: float, note: Note) -> tuple[float, ...]:
    """The thresholds stored with a model, of the labels that have one; ``usual`` for those that no row was there to tune on.

    Args:
      note: called with a line where the usual one is taken.
    """
    found = read_thresholds(folder, labels, of)
    if without := [name for name, value in found.items() if value is None]:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        note(f"no validation row could tune a threshold of {', '.join(without[:5])}{more}: {usual:g} is used")
    return tuple(usual if value is None else value for value in found.values())
