"""One module per task. There is no registry: a task is found by the name of its module.

A task module defines (see docs/add_a_task.md) ``LABELLED``, whether its rows carry a label, ``END_TOKEN``, whether its texts
end with the tokenizer's end token, and ``make_task(config, labels, counts, tokenizer) -> Task``. A task is a frozen value
with:

- ``head``: the name of the model head it trains;
- ``labels``: label names in the order of class ids (empty if the task has none);
- ``prepare(batch, key)``: the batch that model and loss see, made on the device from the one that the loader made;
- ``weight_of(batch)``: of a prepared batch, the scalar sum of the weights of all examples in a batch;
- ``sums(output, batch)``: a dict of *sums* over the batch, ``loss`` among them; nobody divides until the end;
- ``metrics(sums)``: the final numbers, on the host, from sums added over all batches.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from jaxft.errors import UserError, nearest


def tasks() -> tuple[str, ...]:
    """The names of all tasks."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def task_of_head(head: str | None) -> ModuleType | None:
    """The module of the task that trains a model head; None if there is none."""
    return next((module for module in map(task, tasks()) if module.Task.head == head), None)


def task(name: str) -> ModuleType:
    """The module of a task.

    Raises:
      UserError: there is no such task.
    """
    if name not in tasks():
        raise UserError(f"task.name={name!r}: {nearest(name, tasks())}")
    return importlib.import_module(f"{__name__}.{name}")
