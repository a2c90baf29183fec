"""One module per task. There is no registry: a task is found by the name of its module.

A task module defines (see docs/add_a_task.md) ``LABELLED``, whether its rows carry a label, ``END_TOKEN``, whether its texts
end with the tokenizer's end token, and ``make_task(config, labels, counts, tokenizer) -> Task``. A task is a frozen value
with:

- ``head``: the name of the model head it trains;
- ``labels``: label names in the order of class ids (empty if the task has none);
- ``prepare(batch, key)``: the batch that model and loss see, made on the device from the one that the loader made;
- ``weight_of(batch)``: of a prepared batch, the scalar sum of the weights of all examples in a batch;
- ``sums(output, batch)``: a dict of *sums* over the batch, ``loss`` and ``weight`` among them; nobody divides until the end;
- ``outputs(output, batch)``: a dict of arrays [B, ...], what the model says of each row; empty where sums suffice;
- ``learnable(tokens, offsets)``: how many rows or tokens of ragged texts the loss can be of;
- ``metrics``: the scalars that ``eval.metric`` may name, each ``"max"`` or ``"min"`` for which way is better; the first is the
  default;
- ``score(sums, outputs)``: the final numbers, on the host, from sums and outputs of all batches. A score of nothing is NaN.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jaxft.config.outside import outside_module
from jaxft.errors import UserError, nearest
from jaxft.tasks._scores import collected, is_better

__all__ = ["collected", "is_better", "metric_of", "task", "task_of_head", "tasks"]

_NEEDED = (
    *("LABELLED", "END_TOKEN", "make_task", "Task"),
    *(f"Task.{name}" for name in ("head", "prepare", "weight_of", "learnable", "sums", "outputs", "metrics", "score")),
)


def tasks() -> tuple[str, ...]:
    """The names of all tasks."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def task_of_head(head: str | None, named: str = "") -> ModuleType | None:
    """The module of the task that trains a model head; None if there is none.

    Args:
      named: by the model's run: believed if it is one from outside of jaxft.
    """
    if "." in named and task(named).Task.head == head:
        return task(named)
    return next((module for module in map(task, tasks()) if module.Task.head == head), None)


def metric_of(task: Any, wanted: str | None) -> str:
    """The metric that chooses the best checkpoint: as ``eval.metric`` says, or the task's first one.

    Raises:
      UserError: the task has no such metric.
    """
    if wanted is None:
        return next(iter(task.metrics))
    if wanted not in task.metrics:
        raise UserError(f"eval.metric={wanted!r}: the task has {', '.join(task.metrics)}")
    return wanted


def task(name: str) -> ModuleType:
    """The module of a task: by its name here, or a dotted name of a module that is somewhere else.

    Raises:
      UserError: there is no such task.
    """
    if "." in name:
        return outside_module("task.name", name, _NEEDED, "docs/add_a_task.md")
    if name not in tasks():
        raise UserError(f"task.name={name!r}: {nearest(name, tasks())}")
    return importlib.import_module(f"{__name__}.{name}")
