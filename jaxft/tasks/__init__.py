"""One module per task. There is no registry: a task is found by the name of its module.

A task module defines ``make_task(config, labels, counts) -> Task`` (see docs/add_a_task.md). A task is a frozen value
with:

- ``head``: the name of the model head it trains;
- ``labels``: label names in the order of class ids (empty if the task has none);
- ``weight_of(batch)``: the scalar sum of the weights of all examples in a batch;
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
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def task(name: str) -> ModuleType:
    """The module of a task.

    Raises:
      UserError: there is no such task.
    """
    if name not in tasks():
        raise UserError(f"task.name={name!r}: {nearest(name, tasks())}")
    return importlib.import_module(f"{__name__}.{name}")
