"""Which way each metric of each task is better, scores of nothing, and how sums and outputs of batches become scores."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layouts import MADE, batches

from jaxft import tasks
from jaxft.data.sources.rows import Row
from jaxft.models.contract import Output
from jaxft.reporting.records import to_json
from jaxft.tasks.classification import Task

VOCAB = 96
TASKS: dict[str, Any] = {name: MADE[name](tasks.task(name)) for name in tasks.tasks()}
TASKS["two classes"] = Task(("a", "b"))
METRICS = [(name, metric) for name, task in TASKS.items() for metric in task.metrics]


def labels_of(task: Any) -> tuple[str, ...]:
    return getattr(task, "labels", ())


@functools.cache
def scores(name: str, scale: float, rows: float = 1.0) -> Mapping[str, Any]:
    """Scores of a model that gives the logit ``scale`` to the truth and 0 to all else, each row weighing ``rows``."""
    task, batch = TASKS[name], batches(name)[0]
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    batch["weights"] = batch["weights"] * rows
    if name == "regression":
        # Right answers, or the more of the wrong sign the lower the scale.
        logits = (batch["labels"] * (1.0 if scale > 0 else scale))[:, None]
    elif name == "reranking":
        batch["labels"] = jnp.round(batch["labels"])
        logits = (scale * (2.0 * batch["labels"] - 1))[:, None]
    elif name == "multiple_choice":
        batch = task.prepare(batch, jax.random.key(0))
        logits = scale * jax.nn.one_hot(batch["labels"], batch["starts"].shape[1])[..., None]
    elif name == "embedding":  # each text its own direction; a partner that of its text, or of another one
        kind = np.arange(len(batch["mask"]))[:, None] + (np.arange(2) * (0 if scale > 0 else 1))
        seen = jnp.asarray(kind % len(kind))[jnp.arange(len(kind))[:, None], jnp.maximum(batch["segments"] - 1, 0)]
        batch["texts"] = jnp.arange(2 * len(kind)).reshape(-1, 2)
        logits = jax.nn.one_hot(seen, len(kind)) + 0.01 * jax.nn.one_hot(seen // 2, len(kind))
    elif name == "preference":  # the next token of the chosen reply, or of the other one
        batch["reference"] = jnp.zeros_like(batch["reference"])
        batch = task.prepare(batch, jax.random.key(0))
        towards = jnp.where(batch["segments"] == 1, scale, -scale)[..., None]
        logits = towards * jax.nn.one_hot(batch["targets"], VOCAB)
    elif name == "multi_label":
        logits = scale * (2.0 * batch["labels"] - 1)
    elif name == "question_answering":
        batch = task.prepare(batch, jax.random.key(0))
        logits = scale * jax.nn.one_hot(batch["span"], batch["tokens"].shape[1], axis=1)
    else:
        known = batch["labels"] % max(len(labels_of(task)), 1)
        batch["labels"] = jnp.where(batch["labels"] < 0, -1, known)
        batch = task.prepare(batch, jax.random.key(0))
        logits = scale * jax.nn.one_hot(batch.get("targets", batch["labels"]), len(labels_of(task)) or VOCAB)

    text = batches(name)[0].get("tokens")

    def forward(batch: Any, key: Any) -> Output:
        if name == "replaced_token_detection" and "predict" not in batch:  # it asks for the discriminator's answers
            answers = scale * jnp.where(batch["tokens"] != text, 1.0, -1.0)[..., None]
            return Output(answers, logits=answers)
        of_rows = scale * jax.nn.one_hot(batch["labels"], 2) if name == "sentence_pairs" else None
        return Output(logits, logits=logits, row_logits=of_rows)

    found = tasks.collected([(task.sums(forward, batch, None), task.outputs(forward, batch))])
    return MappingProxyType(tasks.scores(task, *found, rows_of(name, batch)))


def rows_of(name: str, batch: Any) -> list[Row]:
    """The rows of a batch, where the task's scores need them: each token of a context is a letter."""
    if name != "question_answering":
        return []
    context = "qxbcdefghijklm"
    spans = [(first, last + 1) for first, last in np.asarray(batch["span"]).tolist()]
    return [Row(("q", context, [context[a:b]] if a else []), "") for a, b in spans]


@pytest.mark.parametrize(("name", "metric"), METRICS)
def test_a_good_model_is_better_than_a_bad_one(name: str, metric: str) -> None:
    task, good, bad = TASKS[name], scores(name, 5.0)[metric], scores(name, -5.0)[metric]
    assert tasks.is_better(task, metric, good, bad)
    assert not tasks.is_better(task, metric, bad, good)
    assert not tasks.is_better(task, metric, good, good)
    assert tasks.is_better(task, metric, bad, None)
    for value in (math.nan, math.inf, -math.inf):
        assert not tasks.is_better(task, metric, value, None)
        assert not tasks.is_better(task, metric, value, good)


@pytest.mark.parametrize(("name", "metric"), METRICS)
def test_a_score_of_nothing_is_no_score(name: str, metric: str) -> None:
    assert math.isnan(scores(name, 5.0, rows=0.0)[metric])


@pytest.mark.parametrize("name", list(TASKS))
def test_the_first_metric_is_the_default(name: str) -> None:
    task = TASKS[name]
    assert tasks.metric_of(task, None) == next(iter(task.metrics))
    assert {tasks.metric_of(task, metric) for metric in task.metrics} == set(task.metrics)
    assert set(task.metrics) <= scores(name, 5.0).keys()
    json.dumps(to_json(dict(scores(name, 5.0))), allow_nan=False)


def test_batches_are_folded_in_as_they_come() -> None:
    alive: list[int] = []
    most = 0

    class Value:
        def __init__(self, number: int) -> None:
            self.number = number
            alive.append(number)

        def __del__(self) -> None:
            alive.remove(self.number)

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.asarray(self.number, dtype)

    def parts() -> Any:
        nonlocal most
        for number in range(50):
            rows = {"weights": np.asarray([1.0, 0.0]), "seen": np.asarray([number, -1])}
            yield {"sum": Value(number)}, rows
            most = max(most, len(alive))

    sums, outputs = tasks.collected(parts())
    assert sums["sum"] == sum(range(50))
    assert outputs["seen"].tolist() == list(range(50))
    assert most < 8
