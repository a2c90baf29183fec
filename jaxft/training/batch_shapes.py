"""Which shapes the batches of a run can have, and whether they can be split over its mesh."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxft import tasks
from jaxft.config import RunConfig
from jaxft.data.corpus.course import course_of
from jaxft.data.examples import Examples
from jaxft.data.loader import make_buckets
from jaxft.errors import UserError
from jaxft.hub.source import Note
from jaxft.models.contract import Facts
from jaxft.parallel.sharding import AxisRules, ways
from jaxft.training.packing import counts_texts, examples_in, holds_texts, packs, row_length, rows_of_batch


def buckets_of(config: RunConfig, *, scored: bool = False) -> tuple[int, ...]:
    """The padded lengths that a run's batches can have, those of training or of evaluation."""
    if packs(config, tasks.task(config.task.name))[scored]:
        return (row_length(config),)
    return make_buckets(config.data.buckets, row_length(config))


def check_batch_shapes(config: RunConfig, mesh: Mesh | AbstractMesh, rules: AxisRules) -> None:
    """Raises UserError if batches or rows cannot be split over the mesh."""
    parts = ways(mesh, rules, "batch")
    micro = config.train.batch_size // config.train.accumulation
    sizes = [("train.batch_size / train.accumulation", micro), ("eval.batch_size", config.eval.batch_size)]
    course = course_of(config)
    for stage in course.stages[:-1]:
        rows = course.shape(stage).rows
        if rows % config.train.accumulation:
            raise UserError(
                f"train.batch_ramp: the {rows} rows of step {stage.first} are no multiple of train.accumulation={config.train.accumulation}"
            )
        sizes.append(
            (f"train.batch_ramp: rows of step {stage.first} / train.accumulation", rows // config.train.accumulation)
        )
    of_texts = config.data.packing != "none" and counts_texts(tasks.task(config.task.name).fields(config, 0))
    for key, size in () if of_texts else sizes:  # how many rows labelled texts take is known once they are packed
        if size % parts:
            raise UserError(
                f"{key} = {size} cannot be split {parts} ways (mesh slices x data x fsdp); choose a multiple of {parts}"
            )
    parts = ways(mesh, rules, "length")
    for length in (*buckets_of(config), *(config.data.lengths or {}).values()):
        if length % parts:
            inner = "data.buckets" if config.data.lengths is None else "data.lengths"
            key = "data.max_length" if length == row_length(config) else inner
            raise UserError(
                f"{key}: rows of {length} tokens cannot be split {parts} ways (mesh context); choose a multiple"
            )


def check_packed_batches(
    config: RunConfig,
    mesh: Mesh | AbstractMesh,
    rules: AxisRules,
    train: Examples,
    held: Sequence[Examples],
    note: Note,
) -> None:
    """Says how many rows a batch of packed labelled texts takes. Raises UserError if they cannot be split over the mesh, or in
    micro-batches."""
    if not holds_texts(train):
        return
    parts, said = ways(mesh, rules, "batch"), []
    for split, key, size, parts_of in (
        (train, "train.batch_size", config.train.batch_size, parts * config.train.accumulation),
        *((split, "eval.batch_size", config.eval.batch_size, parts) for split in held),
    ):
        rows, each = rows_of_batch(split, size), examples_in(split, np.arange(len(split))) / len(split)
        if rows % parts_of:
            wanted = (max(1, rows // parts_of) * parts_of, -(-rows // parts_of) * parts_of)
            choose = " or ".join(dict.fromkeys(f"{round(each * n)} ({n} rows)" for n in wanted))
            raise UserError(
                f"{key}={size} is {rows} packed rows, which cannot be split {parts_of} ways (mesh slices x data x fsdp, "
                f"train.accumulation); choose {choose}"
            )
        said.append(f"{split.name} {size} texts in {rows} rows")
    note(f"batches: {', '.join(said)}, on average")


def check_lengths(config: RunConfig, facts: Facts) -> None:
    """Raises UserError if texts can be longer than the model takes; images and sounds have no such lengths."""
    limit = facts.limit if facts.processor == "text" else None
    if limit is not None and config.data.max_length > limit:
        raise UserError(
            f"data.max_length={config.data.max_length} is beyond the model's position table of {limit}; set it to {limit} or less"
        )
    longest, most = max(buckets_of(config)), tasks.texts_of_row(config.task)
    if limit is not None and longest > limit * most:
        raise UserError(f"data.buckets: {longest} is beyond the model's position table of {limit * most}")
