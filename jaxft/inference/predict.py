"""A trained model ready to answer: from an exported folder, a run folder or a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from jaxft import checkpoint, models, tasks
from jaxft.config import RunConfig, TaskConfig, load_config, run_config
from jaxft.config.read import stored_tree
from jaxft.config.stored import RunMeta, as_today, checked_meta, said_by, wrong_best
from jaxft.config.tasks import task_options
from jaxft.data.batch import Fields, Shape, collate, text_shape
from jaxft.data.examples import Encoded
from jaxft.data.labels import refuse_alike
from jaxft.data.loader import bucket_of, make_buckets
from jaxft.data.processors.contract import Languages, Processor
from jaxft.data.processors.opened import as_text, fresh_processor, has_processor, open_processor, reads_images
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_checks import check_types, check_vocabulary
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.files import JsonObject
from jaxft.hub.pretrained import load_params
from jaxft.hub.source import (
    SINGLE_LABEL,
    Note,
    make_config,
    open_source,
    problem_of,
    refuse_other_problem,
    resolve_folder,
)
from jaxft.inference.devices import Devices, devices_asked_for
from jaxft.layers import Compute
from jaxft.models import adapters
from jaxft.models.contract import Model, classes_of
from jaxft.models.initial import check_fits
from jaxft.tasks.contract import Answer, Answering, Batch, Task, TaskModule
from jaxft.training.recipe import make_compute
from jaxft.training.setup import settled
from jaxft.training.step import forward_of

BEST = "best"
"""A threshold that is not given, but stored with the model."""
Answers = Callable[[Sequence[Row]], list[tuple[Answer, bool]]]
"""Answers to rows in their order, each with whether something of the row was cut off."""
Predict = Callable[[Sequence[Row]], list[list[tuple[Encoded, dict[str, np.ndarray]]]]]
"""What a model says of rows: of each its examples, with arrays by name."""


def _options_of(module: TaskModule, folder: Path, note: Note) -> TaskConfig:
    """The usual options of a task, or what the model's folder says of them: the model was not trained by a run of it here."""
    name = cast(ModuleType, module).__name__.removeprefix("jaxft.tasks.")
    return tasks.adopted(task_options(name)(name=name), folder, note)


@dataclass(frozen=True)
class Served:
    """A model with all it needs to answer."""

    config: RunConfig
    """The run's configuration if the model came from a run, else the defaults; overrides applied."""
    family_name: str
    model: Model
    params: PyTree[Array]
    processor: Processor
    """Tokenizer, or what makes images."""
    labels: tuple[str, ...]
    """Label names in the order of class ids; empty where the head has no classes."""
    hf_config: dict[str, object]
    devices: Devices
    note: Note
    """Called with a line for what had to be guessed."""
    folder: Path
    """Where its weights are."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a model that reads texts.

        Raises:
          UserError: it reads something else.
        """
        return as_text(self.processor)

    def module(self) -> tasks.TaskModule:
        """The module of the task that the model's head is for.

        Raises:
          UserError: there is none.
        """
        of_rows = models.family(self.family_name).HEADS[self.model.head].classes == "rows"
        classes, named = classes_of(self.model.config), self.config.task.name
        problem = problem_of(self.hf_config, classes) if of_rows else None
        found = tasks.task_of_head(self.model.head, named, problem)
        if of_rows:
            # Of an unknown problem, no task is found: the usual one says what would be needed.
            wanted = SINGLE_LABEL if found is None else tasks.problem_of(found)
            instead = "jaxft.load gives its outputs as logits, and jaxft train with model.head=fresh makes another"
            refuse_other_problem(self.hf_config, classes, wanted, "no task here answers with it", instead)
        if found is None:
            raise UserError(
                f"the model has no head that a task scores (found: {self.model.head}): fine-tune it first (jaxft train)"
            )
        return found

    def config_for(self, module: TaskModule) -> RunConfig:
        """The configuration with the task's options: the run's, or the usual ones if no run of this task made the model."""
        name, folder, note = self.config.task.name, Path(self.processor.folder), self.note
        of_run = tasks.task(name) is module
        options = tasks.adopted(self.config.task, folder, note) if of_run else _options_of(module, folder, note)
        return dataclasses.replace(self.config, task=options)

    def task(self, **changes: object) -> tuple[TaskModule, Task]:
        """The module of the task that the model's head is for, and the task.

        Args:
          changes: to the task, for instance ``threshold=0.8``; None: none. ``threshold="best"``: those stored with the model.

        Raises:
          UserError: no task scores this head, or the task has no such option.
        """
        module = self.module()
        options = self.config_for(module).task
        if getattr(options, "class_weights", "none") == "balanced":
            unweighted: JsonObject = {"class_weights": "none"}
            options = dataclasses.replace(options, **unweighted)
        targets = tasks.Targets(self.labels, problem=tasks.problem_of(module))
        made: Any = module.make_task(options, targets, self.model.facts, self.processor)
        for name, value in changes.items():
            if value is None:
                continue
            if value == BEST and hasattr(made, "decided"):
                made = made.decided(self.folder, self.note)
                continue
            if name not in {field.name for field in dataclasses.fields(made)}:
                raise UserError(f"--{name}: answers of {self.model.head} have none; leave it out")
            made = dataclasses.replace(made, **{name: value})
        return module, made


def open_model(reference: str, overrides: list[str], note: Note, *, head: str | None = "stored") -> Served:
    """Opens a model folder, run folder or checkpoint.

    Args:
      reference: a Hugging Face folder or hub id; a run folder (its export, else its best checkpoint); a checkpoint folder;
        each of the folders also as ``s3://`` or ``gs://``.
      overrides: ``key=value`` pairs over the run's configuration (or the defaults).
      note: called with a line for everything that was guessed or left unused.
      head: head to open; ``stored``: the one the weights have.

    Raises:
      UserError: there is no such model, or it is not usable.
    """
    reference = checkpoint.local_model(reference)
    folder = Path(reference).expanduser()
    run_file = folder / "config.yaml"
    if run_file.is_file():
        exported = folder / "export"
        if (exported / "config.json").is_file():
            # Its tokenizer is beside it, wherever data.tokenizer was when the run was made.
            beside = ["data.tokenizer=null", *overrides]
            config = load_config(str(run_file), beside, stored=True)
            _warn_of_wrong_best(stored_tree(run_file), note)
            return _from_folder(str(exported), config, note, head, devices_asked_for(overrides))
        return _from_checkpoint(folder, overrides, note)
    if folder.is_dir() and checkpoint.is_checkpoint(folder):
        return _from_checkpoint(folder, overrides, note)
    # Without a run there is no data.max_length but the one asked for, or the one that the tokenizer's files state.
    asked = any(override.startswith("data.max_length=") for override in overrides)
    config = load_config(None, overrides)
    return _from_folder(reference, config, note, head, devices_asked_for(overrides), stated_length=not asked)


def _from_folder(
    reference: str, config: RunConfig, note: Note, head: str | None, devices: Devices, *, stated_length: bool = False
) -> Served:
    source = open_source(reference, note, family=config.model.family, as_shown=True)
    head = source.stored_head() if head == "stored" else head
    model = source.family.Model(source.config, head, _compute(config, devices))
    params = load_params(source, model, note, mesh=devices.mesh)
    labels = source.labels or ()
    if head is not None and source.family.HEADS[head].classes and not labels:
        labels = tuple(f"LABEL_{i}" for i in range(classes_of(source.config) or 0))
    folder = source.folder if config.data.tokenizer is None else resolve_folder(config.data.tokenizer)
    texts = model.facts.processor == "text"
    if stated_length and texts and (stated := Tokenizer(folder, model_type=source.family_name).stated_length):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=stated))
    hf_config = source.hf_config
    return _served(config, source.family_name, model, params, folder, labels, hf_config, devices, note, source.folder)


def _compute(config: RunConfig, devices: Devices) -> Compute:
    return make_compute(config.model, jax.default_backend(), devices.rules, jax.devices()[0].device_kind)


def _from_checkpoint(folder: Path, overrides: list[str], note: Note) -> Served:
    config, name, model, params, tokenizer, labels, hf_config = restored(folder, overrides, note)
    devices = devices_asked_for(overrides)
    params = devices.spread(model, params)
    return _served(config, name, model, params, tokenizer, labels, hf_config, devices, note, folder)


def restored(
    folder: Path, overrides: list[str], note: Note
) -> tuple[RunConfig, str, Model, PyTree[Array], Path, tuple[str, ...], dict[str, object]]:
    """A checkpoint's configuration, family name, model, parameters, tokenizer folder (unread), labels and config.json.

    Parameters are read when they are used (:func:`jaxft.checkpoint.open_params`), unless there are adapters to be merged.
    """
    params, said = checkpoint.open_params(folder)
    meta = checked_meta(said, folder)
    with said_by(folder):
        tree = as_today(meta["config"])
        run_config(tree)
        family = models.family(meta["family"])
        arch = make_config(family, meta["arch"])
        if meta["head"] not in family.HEADS:
            raise UserError(f"head is {meta['head']!r:.60}, which {meta['family']} has not")
    config = _override(tree, overrides)
    _warn_of_wrong_best(meta["config"], note)
    model = family.Model(arch, meta["head"], _compute(config, devices_asked_for(overrides)))
    named = any(override.startswith("data.tokenizer=") for override in overrides)
    tokenizer = _tokenizer_of(folder, meta, config, model.facts.inputs, note, named=named)
    if config.model.lora.rank is not None:
        whole = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
        params = adapters.merged(whole, config.model.lora.alpha)
    check_fits(params, model, folder)
    hf_config = meta["hf_config"]
    if config.data.train is not None and family.HEADS[meta["head"]].classes == "rows":
        # config.json is that of the folder the run began from; its head may have been for something else.
        problem = tasks.problem_of(tasks.task(config.task.name))
        hf_config = hf_config if problem is None else hf_config | {"problem_type": problem}
    return config, meta["family"], model, params, tokenizer, tuple(meta["labels"]), hf_config


def _tokenizer_of(folder: Path, meta: RunMeta, config: RunConfig, inputs: Fields, note: Note, *, named: bool) -> Path:
    """The folder of a checkpoint's tokenizer, or of what makes images: as ``named`` by the user, where the run had it, or what the run
    named then."""
    if named and config.data.tokenizer is not None:
        found: Path | None = resolve_folder(config.data.tokenizer)
    else:
        found = checkpoint.find_tokenizer(meta, folder)
    if found is None:
        reference = config.data.tokenizer or config.model.init
        if reference is None:  # of no run: a folder without a tokenizer was converted, or its tokenizer was taken away
            return folder / meta["tokenizer"]
        note(f"{meta['tokenizer']} is gone; the tokenizer of {reference} is used")
        found = resolve_folder(reference)
    then = meta.get("tokenizer_digest")  # checkpoints of earlier versions do not say
    there, stored = then is not None and has_processor(found, inputs), _stored_inputs(meta["family"], meta["hf_config"])
    said = Languages(*config.task.languages)
    if there and open_processor(found, None, inputs, meta["family"], stored, said).digest() != then:
        what = "the tokenizer has changed since the run: it gives other ids"
        if reads_images(inputs):
            what = "what makes images has changed since the run: it gives other pixels"
        note(f"warning: {found}: {what} than the model was trained on")
    return found


def _stored_inputs(family: str, hf_config: dict[str, object]) -> Fields | None:
    """What a model of a config.json reads, which may be another than ours of its weights; None: there is no such file."""
    if not hf_config:
        return None
    module = models.family(family)
    return module.facts(make_config(module, module.config_from_hf(hf_config))).inputs


def _warn_of_wrong_best(tree: Mapping[str, object], note: Note) -> None:
    if wrong := wrong_best(tree):
        note(f"warning: {wrong}")


def _override(tree: Mapping[str, object], overrides: list[str]) -> RunConfig:
    import tempfile

    # Overrides work on run files; the stored configuration is one.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
        return load_config(str(path), overrides)


def _once(note: Note) -> Note:
    """The same, which says nothing twice."""
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            note(text)

    return say


def _served(
    config: RunConfig,
    family: str,
    model: Model,
    params: PyTree[Array],
    tokenizer_folder: Path,
    labels: tuple[str, ...],
    hf_config: dict[str, object],
    devices: Devices,
    note: Note,
    folder: Path,
) -> Served:
    facts, length = model.facts, config.data.max_length
    length = length if facts.limit is None else min(length, facts.limit)
    if config.model.init is None and not has_processor(tokenizer_folder, facts.inputs) and reads_images(facts.inputs):
        processor = fresh_processor(tokenizer_folder, facts.inputs)  # of a run from random weights
    else:
        said, stored = Languages(*config.task.languages), _stored_inputs(family, hf_config)
        processor = open_processor(tokenizer_folder, length, facts.inputs, family, stored, said)
    if isinstance(processor, Tokenizer):
        check_vocabulary(processor, facts.inputs, paired=config.data.text_pair is not None)
    refuse_alike(labels, "the model's config.json")
    return Served(config, family, model, params, processor, labels, hf_config, devices, _once(note), folder)


def make_answerer(served: Served, batch_size: int, **changes: object) -> Answers:
    """``rows -> answers`` in the same order, each with whether something of the row was cut off.

    Args:
      changes: to the task, for instance ``threshold=0.8``.

    Raises:
      UserError: no task answers with the model's head, or not with these changes.
    """
    task, predict = make_predictor(served, batch_size, **changes)

    def answers(rows: Sequence[Row]) -> list[tuple[Answer, bool]]:
        return [
            (task.answer(row.values, some), any(one.dropped for one, _ in some))
            for row, some in zip(rows, predict(rows), strict=True)
        ]

    return answers


def make_predictor(served: Served, batch_size: int, **changes: object) -> tuple[Answering, Predict]:
    """The task that answers with a model, and ``rows -> the examples of each with what the model says of them``.

    Examples are sorted by length into padded batches of at most ``batch_size``; one program is compiled per padded shape, when
    it is first needed. Arguments and errors are those of :func:`make_answerer`.
    """
    if not hasattr(served.module().Task, "predictions"):
        writes = "jaxft transcribe" if served.model.facts.processor == "audio" else "jaxft generate"
        instead = f"{writes} writes its texts" if served.model.facts.writes else "jaxft eval scores it"
        raise UserError(f"jaxft predict has no answers of a model for {served.model.head}; {instead}")
    module, made = served.task(**changes)
    task = cast(Answering, made)
    config, processor = settled(served.config_for(module), module), served.processor
    fields, ways = module.fields(config, processor.pad_id), served.devices.batch_ways
    rendering = tasks.rendering_of(module, config, processor)
    served.devices.check_batch("--batch-size", batch_size)
    buckets = make_buckets(None, (processor.max_length or 512) * tasks.texts_of_row(config.task))

    def asked(params: PyTree[Array], batch: Batch) -> Batch:
        return task.predictions(forward_of(served.model, params), batch)

    predictions = served.devices.compiled(asked, fields)

    def computed(encoded: Sequence[Encoded]) -> list[dict[str, np.ndarray]]:
        lengths = [len(one.example["tokens"]) if rendering is None else 1 for one in encoded]
        order, found = sorted(range(len(encoded)), key=lengths.__getitem__), {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            size = min(batch_size, -(-(1 << (len(chosen) - 1).bit_length()) // ways) * ways)
            shape = text_shape(size, bucket_of(lengths[chosen[-1]], buckets))
            examples = [encoded[i].example for i in chosen]
            if rendering is not None:
                shape = Shape(size, tuple(rendering.sizes.items()))
                examples = [rendering.rendered(one, None) for one in examples]
            there = {name: f for name, f in fields.items() if f.value is not None or name in examples[0]}
            made = jax.device_get(predictions(served.params, collate(examples, there, shape)))
            found |= {i: {name: value[k] for name, value in made.items()} for k, i in enumerate(chosen)}
        return [found[i] for i in range(len(encoded))]

    def predict(rows: Sequence[Row]) -> list[list[tuple[Encoded, dict[str, np.ndarray]]]]:
        if not rows:
            return []
        if isinstance(processor, Tokenizer):
            check_types(processor, served.model.facts.inputs, paired=len(rows[0].values) == 2)
        encoded = list(module.encode(rows, processor, None, config))
        parts: list[list[tuple[Encoded, dict[str, np.ndarray]]]] = [[] for _ in rows]
        for one, outputs in zip(encoded, computed(encoded), strict=True):
            parts[one.row].append((one, outputs))
        return parts

    return task, predict
