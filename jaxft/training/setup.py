"""From a resolved configuration to everything a run needs, before its first step: data, model, task, mesh, optimizer."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import jax
import jax.numpy as jnp

from jaxft import models, tasks
from jaxft.config import RunConfig
from jaxft.config.ranges import MOST_NUMBER
from jaxft.data.corpus.batches import StreamBatches, StreamOf
from jaxft.data.corpus.course import course_of
from jaxft.data.examples import Examples, Split
from jaxft.data.labels import declared_labels, refuse_alike
from jaxft.data.lengths import advice
from jaxft.data.loader import Batches, local_rows
from jaxft.data.packing import packed_fields
from jaxft.data.processors.contract import Processor
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_checks import check_vocabulary
from jaxft.data.rendering import Rendering, has_lengths
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError, listed
from jaxft.hub.pretrained import load_params
from jaxft.hub.source import REGRESSION, Note, Source, fresh_config
from jaxft.machine import processes
from jaxft.models import adapters, reinit
from jaxft.models.contract import Facts, Model
from jaxft.models.initial import init_params, shapes_and_axes, spread
from jaxft.models.rates import model_with_rates
from jaxft.parallel.sharding import make_abstract_mesh, make_mesh, make_rules
from jaxft.tasks.contract import Sampler
from jaxft.training.batch_shapes import buckets_of, check_batch_shapes, check_lengths, check_packed_batches
from jaxft.training.corpora import Streams, open_streams
from jaxft.training.optim import make_schedule
from jaxft.training.packing import (
    choose_packing,
    packed,
    packs,
    rows_of_batch,
    tells_texts_apart,
)
from jaxft.training.processors import processor_of, stand_in_processor
from jaxft.training.recipe import Recipe, assumed_targets, family_of, make_recipe, open_start, planned_targets
from jaxft.training.rows import Rows, open_rows
from jaxft.training.rows_said import report_data
from jaxft.training.samples import open_sampler
from jaxft.trees import Params, leaves_of, map_paths


@dataclass
class Times:
    """Seconds by cause, for "time to first step"."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
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
    processor: Processor
    """Tokenizer, or what makes images."""
    rendering: Rendering | None
    """What examples are made by when they are wanted; None: rows are stored as batches hold them."""
    train: Examples
    held_out: Examples
    buckets: tuple[int, ...]
    """Padded lengths of training batches."""
    scored_buckets: tuple[int, ...]
    """Padded lengths of batches of held-out rows."""
    total_steps: int
    eval_every: int
    scored: tuple[Row, ...] = ()
    """The held-out rows themselves, where the task's scores or report need them."""
    test: Examples | None = None
    """Rows that are scored once, at the end; None: none."""
    test_scored: tuple[Row, ...] = ()
    sampler: Sampler | None = None
    """What writes texts to be read at each evaluation; None: nothing does."""

    def train_batches(self, seed: int) -> Batches:
        """Training batches, shuffled by ``seed``."""
        return self._batches(self.train, rows_of_batch(self.train, self.config.train.batch_size), seed)

    def eval_batches(self) -> Batches:
        """Held-out batches: every row once."""
        return self._batches(self.held_out, rows_of_batch(self.held_out, self.config.eval.batch_size), None)

    def test_batches(self) -> Batches:
        """Batches of the test: every row once."""
        assert self.test is not None
        return self._batches(self.test, rows_of_batch(self.test, self.config.eval.batch_size), None)

    def _batches(self, split: Examples, rows: int, seed: int | None) -> Batches:
        part = local_rows(self.mesh, self.model.compute.rules, rows)
        buckets = self.scored_buckets if seed is None else self.buckets
        if isinstance(split, StreamOf):
            course = None if seed is None else course_of(self.config)
            return StreamBatches(split, rows, buckets, seed, part, course=course)
        return Batches(split, rows, buckets, seed, part, rendering=self.rendering)

    def epochs_before(self, step: int) -> float:
        """How often training rows have been read before a step."""
        if isinstance(self.train, StreamOf):
            return course_of(self.config).blocks_before(step) / len(self.train)
        return step / steps_per_epoch(self.config, self.train)

    def start_params(self, seed: int, note: Note) -> Params:
        """The parameters before step 0, placed on the mesh."""
        # No rate plays a part in them: runs that differ in arguments of their step share what is compiled here.
        model = model_with_rates(self.model, dict.fromkeys(self.dropouts, 0.0))
        if self.source is None:
            return self._begun(model, init_params(model, seed, self.shardings))
        base = adapters.base_of(model)
        fresh = self.fresh_head
        with processes.raise_together():  # each process reads, and judges, what its devices keep
            loaded = load_params(self.source, base, note, mesh=self.mesh, seed=seed, fresh_head=fresh, finite=True)
        loaded = self._begun(base, loaded) if fresh else loaded
        if self.redrawn:
            loaded = reinit.redrawn(base, loaded, self.redrawn, seed, self.mesh)
            note(reinit.said(base, self.redrawn, self.config.model.reinit_layers))
        if not isinstance(model, adapters.Adapted):
            return loaded
        return adapters.with_adapters(model, loaded, seed, self.shardings)

    def _begun(self, model: Model, params: Params) -> Params:
        """The same with the bias of a fresh head that the task asks for (:class:`~jaxft.tasks.contract.Biased`)."""
        bias = getattr(self.task, "head_bias", None)
        if bias is None:
            return params
        leaves = leaves_of(*shapes_and_axes(model))
        found = {path for path, leaf in leaves.items() if leaf.axes == ("classes",)}

        def begun(path: str, leaf: jax.Array) -> jax.Array:
            return spread(jnp.asarray(bias, leaf.dtype), leaf.sharding) if path in found else leaf

        return map_paths(begun, params)


def prepare(
    config: RunConfig,
    note: Note,
    times: Times,
    *,
    open_start: Callable[[RunConfig, Note], Source | None] = open_start,
    open_rows: Callable[[RunConfig, tasks.TaskModule, Processor, Source | None, Note], Rows] = open_rows,
    tunable: bool = False,
) -> Setup:
    """Reads data, config.json and tokenizer, and decides labels, head, shapes, schedule; weights are read later.

    Args:
      open_start: what opens the folder of weights; a sweep's keeps what was read.
      open_rows: what reads and encodes rows, likewise.
      tunable: whether the train step takes rates and other numbers of ``optim`` as arguments.

    Raises:
      UserError: anything in the configuration, data or model folder that cannot work.
    """
    mesh, rules = make_mesh(config.mesh), make_rules(config.mesh)
    check_batch_shapes(config, mesh, rules)
    module = tasks.task(config.task.name)
    config = settled(config, module)
    with times.part("weights"):
        source = open_start(config, note)
        processor = processor_of(config, source)
        folder = processor.folder if source is None else source.folder
        config = dataclasses.replace(config, task=tasks.adopted(config.task, folder, note))
    with times.part("data"):
        streams = open_streams(config, module, processor, note)
        found = open_rows(config, module, processor, source, note) if streams is None else None
    targets = tasks.Targets() if found is None else found.targets
    fresh_head = _fresh_head(config, source, module, targets, note)
    texts: tuple[Split, ...] = ()
    if found is not None:
        report_data(found, config, note)
        _advise(found.train, config, source, note)
        texts = tuple(split for split, _ in found.splits)
        config = _packing_settled(config, found.train, module, source, note)
        check_batch_shapes(config, mesh, rules)  # rows of one text each, if that was chosen, were not looked at yet
    train, *held = _rows_of(config, streams, texts, note)
    check_packed_batches(config, mesh, rules, train, held, note)

    total = steps_of(config, train)
    platform = mesh.devices.flat[0].platform
    recipe = make_recipe(config, mesh, source, targets, processor, total, platform, tunable=tunable)
    facts = recipe.model.facts
    check_lengths(config, facts)
    if isinstance(processor, Tokenizer):
        check_vocabulary(processor, facts.inputs, paired=config.data.text_pair is not None)
    if texts:
        _check_learnable(recipe.task, texts[0], texts[1:], config, note)
    for line in (line for split in texts for line in tasks.remarks(recipe.task, split)):
        note(line)
    if schedule := getattr(recipe.task, "schedule", ""):
        note(schedule)
    return Setup(
        **{name.name: getattr(recipe, name.name) for name in fields(recipe)},
        source=source,
        fresh_head=fresh_head,
        processor=processor,
        rendering=tasks.rendering_of(module, config, processor),
        train=train,
        held_out=held[0],
        buckets=buckets_of(config),
        scored_buckets=buckets_of(config, scored=True),
        total_steps=total,
        eval_every=config.eval.every or steps_per_epoch(config, train),
        scored=found.eval.rows if found else (),
        test=held[1] if len(held) > 1 else None,
        test_scored=found.test.rows if found and found.test else (),
        sampler=open_sampler(recipe, processor, found.eval.rows if found else ()),
    )


def _packing_settled(
    config: RunConfig, train: Split, module: tasks.TaskModule, source: Source | None, note: Note
) -> RunConfig:
    """The configuration with ``data.packing`` as ``auto`` turns out."""
    if config.data.packing != "auto":
        return config
    facts, _ = planned_targets(config, source)
    # A family that gives one answer a row cannot learn those of several texts.
    head = family_of(config, source).HEADS.get(module.Task.head)
    apart = head is None or tells_texts_apart(facts, packed_fields(module.fields(config, 0)), head)
    chosen = choose_packing(train, config, facts, module.PACKING and apart, note)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, packing=chosen))


def _rows_of(config: RunConfig, streams: Streams | None, texts: Sequence[Split], note: Note) -> Sequence[Examples]:
    """The training rows and those that are scored, of one text each or packed."""
    if streams is not None:
        return (streams.train, *streams.held_out)
    training, scoring = packs(config, tasks.task(config.task.name))
    if training and not scoring:
        note("held-out rows are not packed: evaluation lets the model write, a text for each row")
    return [packed(part, config, note) if (scoring if n else training) else part for n, part in enumerate(texts)]


def check_config(config: RunConfig) -> None:
    """The checks of :func:`prepare` that need neither data nor weights nor devices.

    Raises:
      UserError: the run could not start, whatever the data.
    """
    # One device where the mesh takes all that remain: what does not divide then never will.
    sizes = {axis: getattr(config.mesh, axis) for axis in ("slices", "data", "fsdp", "tensor", "context")}
    mesh = make_abstract_mesh(config.mesh, math.prod(size for size in sizes.values() if size != -1))
    check_batch_shapes(config, mesh, make_rules(config.mesh))
    settled(config, tasks.task(config.task.name))
    tasks.metric_of(stand_in_task(config), config.eval.metric)
    if config.model.family is not None:
        models.family(config.model.family)
        if config.model.init is None:
            fresh_config(config.model.family, config.model.arch)
    if config.train.steps is not None:
        make_schedule(config.optim, config.train.steps)


def stand_in_task(config: RunConfig) -> tasks.Task:
    """What stands for a run's task where no row is read: it has the metrics."""
    module = tasks.task(config.task.name)
    labels = declared_labels(config.data.labels)[0] or ("0", "1")
    # Weights are given by the names of labels, which are not known yet.
    known = {"class_weights": "none"} if hasattr(config.task, "class_weights") else {}
    options, facts = dataclasses.replace(config.task, **known), Facts({}, ())
    return module.make_task(options, assumed_targets(config, labels), facts, stand_in_processor(module))


def files_beside(task: tasks.Task, model: Model, config: RunConfig) -> Mapping[str, str]:
    """What the task of a run has to say beside the weights of its model (:class:`~jaxft.tasks.contract.Accompanied`)."""
    made = getattr(task, "files", None)
    return {} if made is None else made(model.facts.stacks[-1].width, config.data.max_length)


def files_of_run(config: RunConfig, model: Model, processor: Processor | None) -> Mapping[str, str]:
    """The same of a run of which there is the configuration alone, a model of its checkpoint, and its processor if that can be read."""
    module = tasks.task(config.task.name)
    if module.Task.head != model.head or not hasattr(module.Task, "files"):
        return {}
    stand_in = stand_in_processor(module, inputs=model.facts.inputs)
    task = module.make_task(config.task, tasks.Targets(), model.facts, processor or stand_in)
    return files_beside(task, model, config)


def settled(config: RunConfig, module: tasks.TaskModule) -> RunConfig:
    """The configuration with ``data.long_texts`` as the task means ``auto``.

    Raises:
      UserError: the task cannot do with long texts, or with packing, what is asked for.
    """
    wanted, able, name = config.data.long_texts, module.LONG_TEXTS, config.task.name
    if wanted not in ("auto", *able):
        raise UserError(f"data.long_texts={wanted}: the task {name} has {' and '.join(able)}; use one of these")
    if not module.PACKING and config.data.packing == "best_fit":
        raise UserError(f"data.packing={config.data.packing}: rows of the task {name} cannot share a row yet; use none")
    if config.data.stride is not None and (able[0] if wanted == "auto" else wanted) != "windows":
        raise UserError(f"data.stride={config.data.stride}: the task {name} reads no windows here; leave it out")
    if wanted == "auto":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, long_texts=able[0]))
    _check_row_rules(config, module)
    return config


def _check_row_rules(config: RunConfig, module: tasks.TaskModule) -> None:
    """Raises UserError if labels are to be renamed, or rows without any left out, that the task does not read."""
    data, name = config.data, config.task.name
    if data.label_map is None and data.missing_label == "refuse":
        return  # columns need not be known where nothing is read, as by `predict` on texts of the command line
    kinds = {column.kind for column in module.columns(config)}
    if data.label_map is not None and "label" not in kinds and not getattr(module, "LABEL_MAP", False):
        raise UserError(f"data.label_map={data.label_map}: renames labels, which {name} does not read; leave it out")
    if data.missing_label != "refuse" and kinds <= {"text", "words", "texts"}:
        raise UserError(f"data.missing_label={data.missing_label}: rows of {name} need no label; leave it out")


def steps_per_epoch(config: RunConfig, train: Examples) -> int:
    """Optimizer steps that show the training rows once."""
    return -(-len(train) // rows_of_batch(train, config.train.batch_size))


def steps_of(config: RunConfig, train: Examples) -> int:
    """Optimizer steps of a whole run on these training rows.

    Raises:
      UserError: more than can be counted.
    """
    if config.train.steps is not None:
        return config.train.steps
    found = (config.train.epochs or 0) * steps_per_epoch(config, train)
    if found > MOST_NUMBER:
        raise UserError(
            f"train.epochs={config.train.epochs}: makes {found:.0e} steps; at most {MOST_NUMBER} are possible"
        )
    return max(1, round(found))


def _fresh_head(
    config: RunConfig, source: Source | None, module: tasks.TaskModule, targets: tasks.Targets, note: Note
) -> bool:
    """Whether the head is made afresh: asked for, or because the folder's does not fit the labels; says why."""
    if source is None or config.model.head == "fresh" or not targets.labels:
        return config.model.head == "fresh"
    if source.head != module.Task.head:
        return True
    stored, labels = source.labels, targets.labels
    if targets.problem == REGRESSION and source.classes == 1:  # what a number is called is no part of its head
        note("the checkpoint's head is kept")
        return False
    if stored is None and source.classes == len(labels) and declared_labels(config.data.labels)[0]:
        note(
            f"the checkpoint's head names no labels; its {len(labels)} classes are taken to be data.labels, in that order"
        )
        return False
    if stored is None or stored != labels:
        note(
            f"the checkpoint's head has labels {_in_list(stored or ())}, the task {_in_list(labels)}: a fresh head is made"
        )
        return True
    refuse_alike(stored, f"{source.folder}/config.json")
    note(f"the checkpoint's head is kept: labels {_in_list(labels)}")
    return False


def _in_list(names: Sequence[str]) -> str:
    return f"[{listed(map(repr, names))}]"


def _check_learnable(task: tasks.Task, train: Split, held: Sequence[Split], config: RunConfig, note: Note) -> None:
    """Raises UserError if no loss can be of the training rows, as where each text is a single token; warns of held-out rows."""
    if not _any_learnable(task, train):
        raise UserError(
            f"{config.data.train}: none of its {len(train)} texts has a token that {config.task.name} can predict: they are too short"
        )
    for split in held:
        if not _any_learnable(task, split):
            what = "held-out" if split.name == "eval" else split.name
            note(f"warning: no {what} text has a token that {config.task.name} can predict: there will be no scores")


def _any_learnable(task: tasks.Task, split: Split) -> bool:
    return any(task.learnable(part) for part in split.parts(1 << 16))  # of a token cache, only the first part is read


def _advise(train: Split, config: RunConfig, source: Source | None, note: Note) -> None:
    if tasks.texts_of_row(config.task) > 1 or not has_lengths(train):
        return  # lengths of rows say little of those of their texts
    limit = source.family.facts(source.config).limit if source is not None else None
    buckets = buckets_of(config) if config.data.packing == "none" else ()
    if hint := advice(train, config.data.max_length, buckets, limit):
        note(hint)
