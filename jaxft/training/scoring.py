"""Held-out rows through a run's evaluation programs: what they score, and what the model says of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxft import tasks
from jaxft.data.loader import stream, to_global
from jaxft.data.sources.rows import Row
from jaxft.files import JsonObject
from jaxft.tasks.contract import Arrays, Batch, Sums
from jaxft.training.packing import examples_of
from jaxft.training.programs import Programs
from jaxft.training.setup import Setup
from jaxft.trees import Params


class Evaluation(NamedTuple):
    """What an evaluation found."""

    metrics: Mapping[str, object]
    outputs: Arrays
    """What :meth:`jaxft.tasks.contract.Task.outputs` gave of all batches, on every process."""
    order: np.ndarray
    """[examples] the example that each batch's rows were, one after the other."""
    rows: tuple[Row, ...]
    """The rows themselves; empty where they are not in memory."""


def evaluated(setup: Setup, programs: Programs, params: Params, *, test: bool = False) -> Evaluation:
    """What ``params`` make of the held-out rows, or of those of the test; the final partial batch counts exactly its rows."""
    batches = setup.test_batches() if test else setup.eval_batches()
    rows = setup.test_scored if test else setup.scored

    def parts() -> Iterator[tuple[Sums, Batch]]:
        ahead = setup.config.data.read_ahead
        for step, batch in enumerate(stream(batches, 0, batches.steps_per_epoch, ahead)):
            placed = to_global(batch, setup.scored_fields, setup.mesh, setup.model.compute.rules, batches.batch_size)
            yield programs.evaluate[batches.shape_of(step)](params, placed)

    sums, outputs = tasks.collected(parts())
    order = np.concatenate([batches.rows_of(step) for step in range(batches.steps_per_epoch)])
    metrics = tasks.scores(setup.task, sums, outputs, rows)
    return Evaluation(metrics, outputs, examples_of(batches.split, order), rows)


def evaluate(setup: Setup, programs: Programs, params: Params, *, test: bool = False) -> Mapping[str, object]:
    """Metrics of ``params`` on the held-out rows, or on those of the test."""
    return evaluated(setup, programs, params, test=test).metrics


def samples_of(setup: Setup, params: Params, found: Evaluation) -> list[JsonObject]:
    """Texts that ``params`` write, to be read: records of ``samples.jsonl`` without their step."""
    samples = [] if setup.sampler is None else setup.sampler(params, found.outputs)
    return [{name: value for name, value in one._asdict().items() if value is not None} for one in samples]
