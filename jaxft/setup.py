"""From a resolved configuration to everything a run needs, before its first step: data, model, task, mesh, optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxft import models, tasks
from jaxft.config import ModelConfig, RunConfig
from jaxft.data.encode import Split, encode_rows, hold_out, label_text, read_rows, sorted_labels
from jaxft.data.loader import Batches, local_rows, make_buckets
from jaxft.data.packing import pack
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.optim import make_optimizer, make_schedule
from jaxft.pretrained import (
    Source,
    check_vocabulary,
    init_params,
    load_params,
    make_config,
    open_source,
    resolve_folder,
    shapes_and_axes,
)
from jaxft.sharding import DEFAULT_RULES, AxisRules, check_split, make_mesh, make_rules, shardings_of, ways

Note = Callable[[str], None]


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
        """All parts and their sum on one line."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({parts})"


@dataclass(frozen=True)
class Setup:
    """What all seeds of a run share. Holds no parameters."""

    config: RunConfig
    mesh: Mesh
    family_name: str
    source: Source | None
    """Where weights come from; None: random ones."""
    model: Any
    task: Any
    fresh_head: bool
    tokenizer: Tokenizer
    train: Split
    held_out: Split
    buckets: tuple[int, ...]
    shapes: Any
    """Shaped parameter tree."""
    axes: Any
    """Logical axis names of each parameter."""
    shardings: Any
    """Where each parameter lies."""
    schedule: Any
    optimizer: Any
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
        return load_params(self.source, self.model, note, mesh=self.mesh, seed=seed, fresh_head=self.fresh_head)


def prepare(config: RunConfig, note: Note, times: Times) -> Setup:
    """Reads data, config.json and tokenizer, and decides labels, head, shapes, schedule; weights are read later.

    Raises:
      UserError: anything in the configuration, data or model folder that cannot work.
    """
    mesh, rules = make_mesh(config.mesh), make_rules(config.mesh)
    _check_batch_shapes(config, mesh, rules)
    task_module = tasks.task(config.task.name)
    labelled = task_module.LABELLED
    if labelled and config.data.long_texts == "split":
        raise UserError(f"data.long_texts=split: rows of task {config.task.name} have one label each; use truncate")
    if labelled and config.data.packing != "none":
        raise UserError(f"data.packing: rows of task {config.task.name} have one label each; use none")
    source = None
    with times.part("weights"):
        if config.model.init is not None:
            source = open_source(config.model.init, note, family=config.model.family, arch=config.model.arch)
        tokenizer = _tokenizer(config, source)
    with times.part("data"):
        if config.data.train is None:
            raise UserError("data.train is not set; name a file, for instance data.train=my.csv")
        rows = read_rows(config.data.train, config.data, labelled=labelled)
        if config.data.eval is not None:
            held = read_rows(config.data.eval, config.data, labelled=labelled)
        else:
            # The same rows for every train.seed: runs are compared on them.
            rows, held = hold_out(rows, config.data.eval_fraction, seed=0, labelled=labelled)
        labels, fresh_head = (), config.model.head == "fresh"
        if labelled:
            labels, fresh_head = _decide_labels(config, source, sorted_labels(rows), note)
        known, split = labels if labelled else None, config.data.long_texts == "split"
        end_id = tokenizer.end_id if task_module.END_TOKEN else None
        train = encode_rows("train", rows, known, tokenizer, split=split, end_id=end_id)
        held_out = encode_rows("eval", held, known, tokenizer, split=split, end_id=end_id)
    _report_data(train, held_out, labels, config, note)
    if config.data.packing != "none":
        train, held_out = (_packed(part, config, note) for part in (train, held_out))

    counts = np.bincount(train.labels, minlength=len(labels))
    task = task_module.make_task(config.task, labels, tuple(int(count) for count in counts), tokenizer)
    if config.eval.metric not in task.metric_names():
        raise UserError(f"eval.metric={config.eval.metric!r}: the task has {', '.join(task.metric_names())}")
    compute = make_compute(config.model, mesh.devices.flat[0].platform, rules)
    family_name, model = make_model(config, source, task.head, labels, compute)
    _check_lengths(config, model.config)
    check_vocabulary(tokenizer, model.config)

    steps_per_epoch = -(-len(train) // config.train.batch_size)
    total = config.train.steps or max(1, round((config.train.epochs or 0) * steps_per_epoch))
    shapes, axes = shapes_and_axes(model)
    check_split(mesh, rules, shapes, axes, config.mesh.replicate)
    schedule = make_schedule(config.optim, total)
    return Setup(
        config=config,
        mesh=mesh,
        family_name=family_name,
        source=source,
        model=model,
        task=task,
        fresh_head=fresh_head,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        buckets=_buckets(config),
        shapes=shapes,
        axes=axes,
        shardings=shardings_of(mesh, model.compute.rules, shapes, axes),
        schedule=schedule,
        optimizer=make_optimizer(config.optim, schedule, shapes, axes),
        total_steps=total,
        eval_every=config.eval.every or steps_per_epoch,
    )


def make_compute(config: ModelConfig, platform: str, rules: AxisRules = DEFAULT_RULES) -> Compute:
    """How the model is computed, from the ``model`` section.

    Args:
      platform: of the devices: ``cpu``, ``gpu`` or ``tpu``.
      rules: logical axis names to mesh axes.
    """
    auto = "float32" if platform == "cpu" else "bfloat16"
    return Compute(
        activation_dtype=auto if config.activation_dtype == "auto" else config.activation_dtype,
        matmul_dtype=auto if config.matmul_dtype == "auto" else config.matmul_dtype,
        param_dtype=config.param_dtype,
        layers=config.layers,
        remat=config.remat,
        vocab_tile=config.vocab_tile,
        rules=rules,
    )


def make_model(
    config: RunConfig, source: Source | None, head: str, labels: tuple[str, ...], compute: Compute
) -> tuple[str, Any]:
    """(family name, model) of a run.

    Raises:
      UserError: the architecture cannot be built.
    """
    classes = {"num_labels": len(labels)} if labels else {}
    if labels and config.model.arch.get("num_labels", len(labels)) != len(labels):
        raise UserError(
            f"model.arch.num_labels={config.model.arch['num_labels']}, but there are {len(labels)} labels; leave it out"
        )
    if source is not None:
        tree = {**source.config.__dict__, **classes}
        return source.family_name, source.family.Model(make_config(source.family, tree), head, compute)
    if config.model.family is None:
        raise UserError("model.init is not set, so model.family and model.arch must say what to build")
    family = models.family(config.model.family)
    made = make_config(family, {**config.model.arch, **classes})
    return config.model.family, family.Model(made, head, compute)


def _tokenizer(config: RunConfig, source: Source | None) -> Tokenizer:
    if config.data.tokenizer is not None:
        folder: Path = resolve_folder(config.data.tokenizer)
    elif source is not None:
        folder = source.folder
    else:
        raise UserError("data.tokenizer is not set, and there is no model.init to take it from")
    return Tokenizer(folder, config.data.max_length)


def _decide_labels(
    config: RunConfig, source: Source | None, found: tuple[str, ...], note: Note
) -> tuple[tuple[str, ...], bool]:
    """The label order, and whether the head must be fresh."""
    stored = source.labels if source is not None and source.head == "classification" else None
    declared = None if config.data.labels is None else tuple(label_text(label) for label in config.data.labels)
    keep_stored = stored is not None and set(found) <= set(stored) and config.model.head == "task"
    labels = declared or (stored if keep_stored and stored else found)
    if source is None:
        return labels, True
    if source.head != "classification" or config.model.head == "fresh":
        return labels, True
    if stored is None and source.config.num_labels == len(labels) and declared is not None:
        note(
            f"the checkpoint's head names no labels; its {len(labels)} classes are taken to be data.labels, in that order"
        )
        return labels, False
    if stored != labels:
        note(f"the checkpoint's head has labels {list(stored or ())}, the task {list(labels)}: a fresh head is made")
        return labels, True
    note(f"the checkpoint's head is kept: labels {list(labels)}")
    return labels, False


def _report_data(train: Split, held_out: Split, labels: tuple[str, ...], config: RunConfig, note: Note) -> None:
    for split in (train, held_out):
        lengths = split.lengths
        note(
            f"{split.name}: {len(split)} rows, {lengths.sum()} tokens, length median {int(np.median(lengths))} max {lengths.max()}, "
            f"{split.truncated} truncated to {config.data.max_length} tokens"
        )
    if not labels:
        return
    note(f"labels: {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}")
    absent = [label for i, label in enumerate(labels) if not (train.labels == i).any()]
    if absent:
        note(f"warning: no training row has label {', '.join(absent)}")


def _packed(split: Split, config: RunConfig, note: Note) -> Split:
    length = config.data.max_length
    packed = pack(split, length)
    note(
        f"{split.name}: packed {len(split)} texts into {len(packed)} rows of {length} tokens, "
        f"{packed.offsets[-1] / (len(packed) * length):.1%} full"
    )
    return packed


def _buckets(config: RunConfig) -> tuple[int, ...]:
    if config.data.packing != "none":
        return (config.data.max_length,)
    return make_buckets(config.data.buckets, config.data.max_length)


def _check_batch_shapes(config: RunConfig, mesh: Mesh, rules: AxisRules) -> None:
    parts = ways(mesh, rules, "batch")
    micro = config.train.batch_size // config.train.accumulation
    for key, size in (("train.batch_size / train.accumulation", micro), ("eval.batch_size", config.eval.batch_size)):
        if size % parts:
            raise UserError(
                f"{key} = {size} cannot be split {parts} ways (mesh slices x data x fsdp); choose a multiple of {parts}"
            )
    parts = ways(mesh, rules, "length")
    for length in _buckets(config):
        if length % parts:
            key = "data.max_length" if length == config.data.max_length else "data.buckets"
            raise UserError(
                f"{key}: rows of {length} tokens cannot be split {parts} ways (mesh context); choose a multiple"
            )


def _check_lengths(config: RunConfig, model_config: Any) -> None:
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and config.data.max_length > limit:
        raise UserError(
            f"data.max_length={config.data.max_length} is beyond the model's position table of {limit}; set it to {limit} or less"
        )
    longest = max(_buckets(config))
    if limit is not None and longest > limit:
        raise UserError(f"data.buckets: {longest} is beyond the model's position table of {limit}")
