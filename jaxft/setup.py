"""From a resolved configuration to everything a run needs, before its first step: data, model, task, mesh, optimizer."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxft import lora, models, tasks
from jaxft.config import RunConfig
from jaxft.data.encode import Split, encode_rows, hold_out, read_rows
from jaxft.data.labels import (
    declared_labels,
    fits,
    label_text,
    look_alikes,
    refuse_alike,
    refuse_scores,
    sorted_labels,
)
from jaxft.data.lengths import advice, lengths_text
from jaxft.data.loader import Batches, local_rows, make_buckets
from jaxft.data.packing import pack
from jaxft.data.tokenizer import Tokenizer, check_vocabulary
from jaxft.errors import UserError, listed
from jaxft.initial import init_params
from jaxft.optim import make_schedule
from jaxft.pretrained import load_params
from jaxft.recipe import Recipe, make_recipe, open_start
from jaxft.sharding import AxisRules, make_abstract_mesh, make_mesh, make_rules, ways
from jaxft.source import Note, Source, make_config, resolve_folder


@dataclass
class Times:
    """Seconds by cause, for "time to first step"."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Any:
        """Adds the time of the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def text(self) -> str:
        """The parts that took time, and the sum of all, on one line."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items() if seconds >= 0.05)
        return f"{sum(self.seconds.values()):.1f} s ({parts})"


@dataclass(frozen=True)
class Setup(Recipe):
    """What all seeds of a run share: recipe and data. Holds no parameters."""

    source: Source | None
    """Where weights come from; None: random ones."""
    fresh_head: bool
    tokenizer: Tokenizer
    train: Split
    held_out: Split
    buckets: tuple[int, ...]
    total_steps: int
    eval_every: int

    def train_batches(self, seed: int) -> Batches:
        """Training batches, shuffled by ``seed``."""
        return self._batches(self.train, self.config.train.batch_size, seed)

    def eval_batches(self) -> Batches:
        """Held-out batches: every row once."""
        return self._batches(self.held_out, self.config.eval.batch_size, None)

    def _batches(self, split: Split, size: int, seed: int | None) -> Batches:
        part = local_rows(self.mesh, self.model.compute.rules, size)
        return Batches(split, size, self.buckets, self.tokenizer.pad_id, seed, part)

    def start_params(self, seed: int, note: Note) -> Any:
        """The parameters before step 0, placed on the mesh."""
        if self.source is None:
            return init_params(self.model, seed, self.shardings)
        base = lora.base_of(self.model)
        fresh = self.fresh_head
        loaded = load_params(self.source, base, note, mesh=self.mesh, seed=seed, fresh_head=fresh, finite=True)
        if base is self.model:
            return loaded
        return lora.with_adapters(self.model, loaded, seed, self.shardings)


def prepare(config: RunConfig, note: Note, times: Times) -> Setup:
    """Reads data, config.json and tokenizer, and decides labels, head, shapes, schedule; weights are read later.

    Raises:
      UserError: anything in the configuration, data or model folder that cannot work.
    """
    mesh, rules = make_mesh(config.mesh), make_rules(config.mesh)
    check_batch_shapes(config, mesh, rules)
    task_module = tasks.task(config.task.name)
    labelled = task_module.LABELLED
    _check_rows(config, labelled)
    with times.part("weights"):
        source = open_start(config, note)
        tokenizer = _tokenizer(config, source)
    with times.part("data"):
        if config.data.train is None:
            raise UserError("data.train is not set; name a file, for instance data.train=my.csv")
        rows = read_rows(config.data.train, config.data, labelled=labelled, note=note)
        labels, fresh_head = (), config.model.head == "fresh"
        if labelled:  # before rows are held out: of scores, each label has one row
            labels, fresh_head = _decide_labels(config, source, [row.values[-1] for row in rows], note)
        if config.data.eval is not None:
            held = read_rows(config.data.eval, config.data, labelled=labelled, note=note)
        else:
            # The same rows for every train.seed: runs are compared on them.
            rows, held = hold_out(rows, config.data.eval_fraction, seed=0, labelled=labelled)
        known, split = labels if labelled else None, config.data.long_texts == "split"
        how = {"split": split, "end_id": tokenizer.end_id if task_module.END_TOKEN else None}
        renamed = declared_labels(config.data.labels)[1]
        train = encode_rows("train", rows, known, tokenizer, renamed=renamed, **how)
        held_out = encode_rows("eval", held, known, tokenizer, renamed=renamed, **how)
    _report_data(train, held_out, labels, config, note)
    _advise(train, config, source, note)
    texts = train, held_out
    if config.data.packing != "none":
        train, held_out = (_packed(part, config, note) for part in (train, held_out))

    total = steps_of(config, len(train))
    counts = [int(count) for count in np.bincount(train.labels, minlength=len(labels))]
    recipe = make_recipe(config, mesh, source, labels, counts, tokenizer, total, mesh.devices.flat[0].platform)
    check_lengths(config, recipe.model.config)
    check_vocabulary(tokenizer, recipe.model.config, paired=config.data.text_pair is not None)
    _check_learnable(recipe.task, *texts, config, note)
    return Setup(
        **{name.name: getattr(recipe, name.name) for name in fields(recipe)},
        source=source,
        fresh_head=fresh_head,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        buckets=buckets_of(config),
        total_steps=total,
        eval_every=config.eval.every or _steps_per_epoch(config, len(train)),
    )


def check_config(config: RunConfig) -> None:
    """The checks of :func:`prepare` that need neither data nor weights nor devices.

    Raises:
      UserError: the run could not start, whatever the data.
    """
    # One device where the mesh takes all that remain: what does not divide then never will.
    sizes = {axis: getattr(config.mesh, axis) for axis in ("slices", "data", "fsdp", "tensor", "context")}
    mesh = make_abstract_mesh(config.mesh, math.prod(size for size in sizes.values() if size != -1))
    check_batch_shapes(config, mesh, make_rules(config.mesh))
    module = tasks.task(config.task.name)
    _check_rows(config, module.LABELLED)
    labels = (declared_labels(config.data.labels)[0] or ("0", "1")) if module.LABELLED else ()
    # Weights are given by the names of labels, which are not known yet.
    options = dataclasses.replace(config.task, class_weights="none") if module.LABELLED else config.task
    tokenizer = SimpleNamespace(folder="", mask_id=3, special_ids=(0, 1, 2, 3), vocab_size=30522, end_id=2)
    tasks.metric_of(module.make_task(options, labels, (1,) * len(labels), tokenizer), config.eval.metric)
    if config.model.family is not None:
        family = models.family(config.model.family)
        if config.model.init is None:
            make_config(family, config.model.arch)
    if config.train.steps is not None:
        make_schedule(config.optim, config.train.steps)


def _check_rows(config: RunConfig, labelled: bool) -> None:
    if labelled and config.data.long_texts == "split":
        raise UserError(f"data.long_texts=split: rows of task {config.task.name} have one label each; use truncate")
    if labelled and config.data.packing != "none":
        raise UserError(f"data.packing: rows of task {config.task.name} have one label each; use none")


def _steps_per_epoch(config: RunConfig, rows: int) -> int:
    return -(-rows // config.train.batch_size)


def steps_of(config: RunConfig, rows: int) -> int:
    """Optimizer steps of a whole run on so many training rows."""
    return config.train.steps or max(1, round((config.train.epochs or 0) * _steps_per_epoch(config, rows)))


def _tokenizer(config: RunConfig, source: Source | None) -> Tokenizer:
    if config.data.tokenizer is not None:
        folder: Path = resolve_folder(config.data.tokenizer)
    elif source is not None:
        folder = source.folder
    else:
        raise UserError("data.tokenizer is not set, and there is no model.init to take it from")
    name = config.model.family if source is None else source.family_name
    return Tokenizer(folder, config.data.max_length, model_type=name)


def _decide_labels(
    config: RunConfig, source: Source | None, values: Sequence[object], note: Note
) -> tuple[tuple[str, ...], bool]:
    """The label order, and whether the head must be fresh; ``values`` are the labels of the training rows."""
    stored = source.labels if source is not None and source.head == "classification" else None
    declared, found = declared_labels(config.data.labels)[0], sorted_labels(values)
    labels = declared or found
    if stored is not None and config.model.head == "task":
        # The model's own spelling stays: "True" and "true" are one name.
        same = tuple(map(label_text, stored)) == declared if declared else fits(found, stored)
        labels = stored if same else labels
    if labels is found:
        refuse_scores(found, config.data.label)
    for warning in look_alikes(values, labels):
        note(f"warning: {warning}")
    if source is None:
        return labels, True
    if source.head != "classification" or config.model.head == "fresh":
        return labels, True
    if stored is None and source.config.num_labels == len(labels) and declared:
        note(
            f"the checkpoint's head names no labels; its {len(labels)} classes are taken to be data.labels, in that order"
        )
        return labels, False
    if stored is None or stored != labels:
        note(
            f"the checkpoint's head has labels {_in_list(stored or ())}, the task {_in_list(labels)}: a fresh head is made"
        )
        return labels, True
    refuse_alike(stored, f"{source.folder}/config.json")
    note(f"the checkpoint's head is kept: labels {_in_list(labels)}")
    return labels, False


def _in_list(names: Sequence[str]) -> str:
    return f"[{listed(map(repr, names))}]"


def _report_data(train: Split, held_out: Split, labels: tuple[str, ...], config: RunConfig, note: Note) -> None:
    for split in (train, held_out):
        note(f"{split.name}: {lengths_text(split, config.data.max_length)}")
    if not labels:
        return
    note(f"labels: {listed(labels)}")
    counts = np.bincount(train.labels, minlength=len(labels))
    for rows, said in ((0, "no training row has"), (1, "only one training row has")):
        few = [label for label, count in zip(labels, counts, strict=True) if count == rows]
        if few:
            note(f"warning: {said} label {listed(few)}")


def _check_learnable(task: Any, train: Split, held_out: Split, config: RunConfig, note: Note) -> None:
    """Raises UserError if no loss can be of the training rows, as where each text is a single token; warns of held-out rows."""
    if not task.learnable(train.tokens, train.offsets):
        raise UserError(
            f"{config.data.train}: none of its {len(train)} texts has a token that {config.task.name} can predict: they are too short"
        )
    if not task.learnable(held_out.tokens, held_out.offsets):
        note(f"warning: no held-out text has a token that {config.task.name} can predict: there will be no scores")


def _advise(train: Split, config: RunConfig, source: Source | None, note: Note) -> None:
    limit = getattr(source.config, "max_position_embeddings", None) if source is not None else None
    buckets = buckets_of(config) if config.data.packing == "none" else ()
    if hint := advice(train, config.data.max_length, buckets, limit):
        note(hint)


def _packed(split: Split, config: RunConfig, note: Note) -> Split:
    length = config.data.max_length
    packed = pack(split, length)
    note(
        f"{split.name}: packed {len(split)} texts into {len(packed)} rows of {length} tokens, "
        f"{packed.offsets[-1] / (len(packed) * length):.1%} full"
    )
    return packed


def buckets_of(config: RunConfig) -> tuple[int, ...]:
    """The padded lengths that a run's batches can have."""
    if config.data.packing != "none":
        return (config.data.max_length,)
    return make_buckets(config.data.buckets, config.data.max_length)


def check_batch_shapes(config: RunConfig, mesh: Mesh | AbstractMesh, rules: AxisRules) -> None:
    """Raises UserError if batches or rows cannot be split over the mesh."""
    parts = ways(mesh, rules, "batch")
    micro = config.train.batch_size // config.train.accumulation
    for key, size in (("train.batch_size / train.accumulation", micro), ("eval.batch_size", config.eval.batch_size)):
        if size % parts:
            raise UserError(
                f"{key} = {size} cannot be split {parts} ways (mesh slices x data x fsdp); choose a multiple of {parts}"
            )
    parts = ways(mesh, rules, "length")
    for length in buckets_of(config):
        if length % parts:
            key = "data.max_length" if length == config.data.max_length else "data.buckets"
            raise UserError(
                f"{key}: rows of {length} tokens cannot be split {parts} ways (mesh context); choose a multiple"
            )


def check_lengths(config: RunConfig, model_config: Any) -> None:
    """Raises UserError if rows can be longer than the model's position table."""
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and config.data.max_length > limit:
        raise UserError(
            f"data.max_length={config.data.max_length} is beyond the model's position table of {limit}; set it to {limit} or less"
        )
    longest = max(buckets_of(config))
    if limit is not None and longest > limit:
        raise UserError(f"data.buckets: {longest} is beyond the model's position table of {limit}")
