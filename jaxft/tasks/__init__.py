"""One module per task; :class:`jaxft.tasks.contract.TaskModule` says what it defines. There is no registry: a task is found by the
name of its module, or by the dotted name of a module that is somewhere else.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from jaxft.config import RunConfig, TaskConfig
from jaxft.config.outside import outside_module
from jaxft.data.batch import Fields
from jaxft.data.corpus.pairs import Pairing
from jaxft.data.corpus.reading import Rewriting
from jaxft.data.processors.contract import Processor, TextProcessor
from jaxft.data.rendering import Rendering
from jaxft.errors import UserError, nearest
from jaxft.models.contract import Modality
from jaxft.tasks._scores import collected, is_better, judges, mistakes, remarks, reported, scalar, scores, scores_rows
from jaxft.tasks.contract import Labelled, Note, Targets, Task, TaskModule

__all__ = [
    "Labelled",
    "Targets",
    "Task",
    "TaskModule",
    "adopted",
    "collected",
    "is_better",
    "judges",
    "metric_of",
    "mistakes",
    "modality_of",
    "pairing",
    "problem_of",
    "remarks",
    "rendering_of",
    "reported",
    "rewriting",
    "scalar",
    "scores",
    "scores_rows",
    "sizes_of",
    "stored_fields",
    "task",
    "task_of_head",
    "tasks",
    "texts_of_row",
]

_NEEDED = (
    *("Task", "LONG_TEXTS", "PACKING", "columns", "study", "encode", "fields", "make_task"),
    *(f"Task.{name}" for name in ("head", "prepare", "weight", "learnable", "sums", "outputs", "metrics", "score")),
)


@functools.cache
def tasks() -> tuple[str, ...]:
    """The names of all tasks."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_") and name != "contract"))


def problem_of(module: TaskModule) -> str | None:
    """The ``problem_type`` of the heads that a task trains; None: it has none, or its head has but one."""
    return getattr(module, "PROBLEM", None)


def sizes_of(options: TaskConfig) -> Mapping[str, int]:
    """How long rows of a task can be along axes that are neither tokens nor classes: none, if its module does not define
    ``sizes(options)``."""
    made = getattr(task(options.name), "sizes", None)
    return {} if made is None else made(options)


def texts_of_row(options: TaskConfig) -> int:
    """How many texts of ``data.max_length`` tokens each a row of a task can have: one, if its module does not define
    ``texts_of_row(options)``."""
    made = getattr(task(options.name), "texts_of_row", None)
    return 1 if made is None else made(options)


def modality_of(module: TaskModule) -> Modality:
    """What its rows are made of: texts, if the module does not say ``PROCESSOR``."""
    return getattr(module, "PROCESSOR", "text")


def rendering_of(module: TaskModule, config: RunConfig, processor: Processor) -> Rendering | None:
    """What a task's examples are made by when they are wanted, if its module defines ``rendering(config, processor)``; None: rows are
    stored as batches hold them."""
    made = getattr(module, "rendering", None)
    return None if made is None else made(config, processor)


def stored_fields(module: TaskModule, config: RunConfig, processor: Processor) -> Fields:
    """The fields that a task's rows are stored with, each alone."""
    rendering = rendering_of(module, config, processor)
    return module.fields(config, processor.pad_id) if rendering is None else rendering.stored


def adopted(options: TaskConfig, folder: Path, note: Note) -> TaskConfig:
    """The options of a task with what a model's folder says where they say nothing, if its module defines
    ``adopted(options, folder, note)``."""
    made = getattr(task(options.name), "adopted", None)
    return options if made is None else made(options, folder, note)


def rewriting(options: TaskConfig, tokenizer: TextProcessor) -> Rewriting | None:
    """What becomes of a corpus's documents when they are read, if the task's module defines ``rewriting(options, tokenizer)``."""
    made = getattr(task(options.name), "rewriting", None)
    return None if made is None else made(options, tokenizer)


def pairing(options: TaskConfig, tokenizer: TextProcessor) -> Pairing | None:
    """How a corpus's documents become pairs of texts, if the task's module defines ``pairing(options, tokenizer)``."""
    made = getattr(task(options.name), "pairing", None)
    return None if made is None else made(options, tokenizer)


def task_of_head(head: str | None, named: str = "", problem: str | None = None) -> TaskModule | None:
    """The module of the task that trains a model head; None if there is none.

    Args:
      named: by the model's run: believed if it trains such heads.
      problem: what the head is for, the ``problem_type`` of config.json; None: whatever the first task of such heads is for.
    """

    def fits(module: TaskModule) -> bool:
        return module.Task.head == head and (problem is None or problem_of(module) in (None, problem))

    if named and ("." in named or named in tasks()) and fits(task(named)):
        return task(named)
    return next(filter(fits, map(task, tasks())), None)


def metric_of(task: Task, wanted: str | None) -> str:
    """The metric that chooses the best checkpoint: as ``eval.metric`` says, or the task's first one.

    Raises:
      UserError: the task has no such metric.
    """
    if wanted is None:
        return next(iter(task.metrics))
    if wanted not in task.metrics:
        raise UserError(f"eval.metric={wanted!r}: the task has {', '.join(task.metrics)}")
    return wanted


def task(name: str) -> TaskModule:
    """The module of a task: by its name here, or a dotted name of a module that is somewhere else.

    Raises:
      UserError: there is no such task.
    """
    if "." in name:
        return cast(TaskModule, outside_module("task.name", name, _NEEDED, "docs/add_a_task.md"))
    if name not in tasks():
        raise UserError(f"task.name={name!r}: {nearest(name, tasks())}")
    return cast(TaskModule, importlib.import_module(f"{__name__}.{name}"))
