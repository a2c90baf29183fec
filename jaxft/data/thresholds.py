"""``thresholds.json`` of a model folder: from which probability on a label is given, tuned on the validation rows of the run that
trained the weights beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxft.errors import UserError
from jaxft.files import present, read_json, read_text

FILE = "thresholds.json"
_METRIC = "f1"


def thresholds_text(labels: Sequence[str], found: Mapping[str, float | None], rows: int) -> str:
    """The file's text.

    Args:
      labels: all labels of the model, in the order of class ids.
      found: the threshold of each label that has one; None: no row that it could be tuned on.
      rows: how many rows they were tuned on.
    """
    tree = {"labels": list(labels), "thresholds": dict(found), "metric": _METRIC, "validation_rows": rows}
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_thresholds(folder: Path, labels: Sequence[str], of: Sequence[str]) -> dict[str, float | None]:
    """The thresholds beside a model's weights.

    Args:
      labels: all labels of the model, in the order of class ids.
      of: those that have a threshold.

    Raises:
      UserError: there is no such file, or it is not of a model with these labels.
    """
    path = folder / FILE
    if not present(path):
        raise UserError(
            f"--threshold best: {folder} has no {FILE}, which jaxft train writes beside the weights; give a number"
        )
    tree = read_json(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("thresholds"), dict):
        raise UserError(f"{path}: expected an object with labels and thresholds; train again, or give a number")
    stated, found = tree.get("labels"), tree["thresholds"]
    if stated != list(labels) or found.keys() != set(of):
        named = stated if stated != list(labels) else list(found)
        raise UserError(
            f"{path}: is of a model with other labels ({named!r:.80}), the model beside it has {list(labels)!r:.80}; "
            "train again, or give a number"
        )
    if tree.get("metric") != _METRIC:
        raise UserError(
            f"{path}: metric is {tree.get('metric')!r}, expected {_METRIC!r}; train again, or give a number"
        )
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value <= 1):
            raise UserError(f"{path}: the threshold of {name!r} is {value!r}; it must lie in 0..1")
    return {name: None if found[name] is None else float(found[name]) for name in of}


def beside(folder: Path) -> dict[str, str]:
    """The file's text by its name, for a folder that gets the same weights and labels; nothing where there is none."""
    path = folder / FILE
    return {FILE: read_text(path)} if present(path) else {}
