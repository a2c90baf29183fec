"""Families and tasks keep their contracts: for the type checker, which reads the two tables, and by being there."""

from __future__ import annotations

from jaxft import models, tasks
from jaxft.models.contract import Family
from jaxft.models.families import bert, llama, roberta
from jaxft.tasks import TaskModule, causal_lm, classification, masked_lm, token_classification

FAMILIES: tuple[Family, ...] = (bert, llama, roberta)
TASKS: tuple[TaskModule, ...] = (causal_lm, classification, masked_lm, token_classification)


def test_all_are_listed() -> None:
    assert [models.family(name) for name in models.families()] == list(FAMILIES)
    assert [tasks.task(name) for name in tasks.tasks()] == list(TASKS)
