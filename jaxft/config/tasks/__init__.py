"""The options of tasks: what stands under ``task:`` beside its name. One module per task, found by the task's name; they import
nothing heavy, so that a configuration can be read at once. A task of another package has its ``Config`` in its own module.
"""

from __future__ import annotations

import importlib
import pkgutil

from jaxft.config.outside import outside_module
from jaxft.config.schema import TaskConfig


def tasks_with_options() -> tuple[str, ...]:
    """The tasks that have options besides their name."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def task_options(name: str) -> type[TaskConfig]:
    """The type of the ``task`` section for a task; of a task that there is not, the section that all have.

    Raises:
      UserError: a module of another package that cannot be imported.
    """
    if "." in name:
        return getattr(outside_module("task.name", name, (), "docs/add_a_task.md"), "Config", TaskConfig)
    if name not in tasks_with_options():
        return TaskConfig
    return importlib.import_module(f"{__name__}.{name}").Config
