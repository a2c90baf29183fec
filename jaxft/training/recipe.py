"""What a run computes, apart from its data: model, task, optimizer, and the train step as one program.

Shapes only, no arrays: a plan for hardware that is not there is made of the same recipe as the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxft import models, tasks
from jaxft.config import ModelConfig, RunConfig
from jaxft.data.batch import Fields, Shape, shaped
from jaxft.data.labels import declared_labels
from jaxft.data.packing import CLASSES, packed_fields
from jaxft.data.processors.contract import Processor
from jaxft.errors import UserError
from jaxft.hub.pretrained import check_changes
from jaxft.hub.source import REGRESSION, Note, Source, fresh_config, open_source, refuse_other_problem
from jaxft.layers import Compute
from jaxft.models import adapters
from jaxft.models.contract import Facts, Family, FamilyConfig, Model, classes_of, with_classes
from jaxft.models.initial import shapes_and_axes
from jaxft.models.rates import model_with_rates
from jaxft.models.reinit import redrawn_rows
from jaxft.parallel.sharding import (
    DEFAULT_RULES,
    AxisRules,
    check_split,
    device_kind,
    jitted,
    make_rules,
    replicated,
    shardings_of,
)
from jaxft.tasks import Targets, Task
from jaxft.training import gradients
from jaxft.training.optim import frozen_mask, make_optimizer, make_schedule
from jaxft.training.optim.freezing import Frozen
from jaxft.training.optim.schedules import Schedule
from jaxft.training.optim.tunable import Tunable, shapes_of, table_schedule, tunable_of
from jaxft.training.packing import packs, tells_texts_apart
from jaxft.training.state import TrainState, init_state, state_shardings
from jaxft.training.step import Batch, Gradient, Step, Sums, make_train_step
from jaxft.trees import Axes, Params, Shapes, Shardings, Tree, paths_of

_AXES_OF_IMAGES, _AXES_OF_SOUND = ("height", "width", "channels"), ("frames", "bins")


@dataclass(frozen=True)
class Recipe:
    """A run without its data."""

    config: RunConfig
    mesh: Mesh
    family_name: str
    model: Model
    task: Task
    targets: Targets
    fields: Fields
    """Fields of a training batch."""
    scored_fields: Fields
    """Fields of a batch of held-out rows, which may not be packed."""
    shapes: Shapes
    """Shaped parameter tree."""
    axes: Axes
    """Logical axis names of each parameter."""
    shardings: Shardings
    """Where each parameter lies."""
    schedule: Schedule
    optimizer: optax.GradientTransformation
    frozen: Tree[bool]
    """Tree of bool: which parameters do not train at all; they get no gradient."""
    state: TrainState[jax.ShapeDtypeStruct]
    """The training state, as shapes with shardings."""
    freeze: tuple[str, ...]
    """Patterns of what does not train: those of ``optim.freeze``, and what adapters leave alone."""
    redrawn: Mapping[str, int]
    """Loaded weights that are drawn afresh (:func:`jaxft.models.reinit.redrawn_rows`)."""
    updates: int | None
    """If the train step takes rates and other numbers of ``optim`` as arguments (:mod:`jaxft.training.optim.tunable`), for how many
    updates at most. None: they are constants in it."""
    dropouts: tuple[str, ...]
    """Rates of dropout that are arguments then, too: fields of the model's Config (:mod:`jaxft.models.rates`)."""

    def start(self, params: Params) -> TrainState[jax.Array]:
        """The state before step 0. Traceable."""
        config = self.config
        return init_state(params, self.optimizer, config.optim.ema is not None, config.train.spike_skip is not None)

    def batch(self, shape: Shape, *, scored: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """A training batch, or one of held-out rows, as shapes with shardings."""
        fields = self.scored_fields if scored else self.fields
        return shaped(fields, shape, self.mesh, self.model.compute.rules)

    def shape(self, rows: int, length: int) -> Shape:
        """The shape of a batch of so many rows of so many tokens."""
        axes = dict.fromkeys(axis for field in self.fields.values() for axis in field.axes[1:] if isinstance(axis, str))
        fixed = self.model.facts.inputs[self.model.facts.reads].axes[1:]
        named = _AXES_OF_SOUND if self.model.facts.processor == "audio" else _AXES_OF_IMAGES
        sizes = {axis: size for axis, size in zip(named, fixed, strict=False) if isinstance(size, int)}
        known = {**sizes, "length": length, CLASSES: len(self.targets.labels), **tasks.sizes_of(self.config.task)}
        return Shape(rows, tuple((axis, known[axis]) for axis in axes))

    def seed(self) -> jax.ShapeDtypeStruct:
        """The seed argument of the train step."""
        return jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated(self.mesh))

    def arguments(self, shape: Shape) -> tuple[object, ...]:
        """The arguments of the train step for batches of one shape, as shapes with shardings."""
        fixed = (self.state, self.batch(shape), self.seed())
        if self.updates is None:
            return fixed
        return (*fixed, shapes_of(self.config.optim, self.updates, replicated(self.mesh), self.dropouts))

    def gradient(self, model: Model | None = None) -> Gradient:
        """The gradient that a train step takes.

        Args:
          model: the one it is of, with rates that are arguments. None: ``self.model``.
        """
        return gradients.of_batch(
            self.model if model is None else model,
            self.task,
            accumulation=self.config.train.accumulation,
            param_shardings=self.shardings if self.mesh.size > 1 else None,
            frozen=self.frozen,
        )

    def train_program(self) -> jax.stages.Wrapped:
        """The jitted train step ``(state, batch, seed) -> (state, metrics)``; it donates the state.

        With ``updates``, it takes a :class:`~jaxft.training.optim.tunable.Tunable` besides.
        """
        step = self._step(self.gradient(), self.optimizer, self.schedule, self.config.optim.ema)

        def tuned_step(
            state: TrainState[jax.Array], batch: Batch, seed: jax.Array, tunable: Tunable[jax.Array]
        ) -> tuple[TrainState[jax.Array], Sums]:
            schedule = table_schedule(tunable.rates)
            optimizer = _optimizer(self.config, self.freeze, schedule, self.shapes, self.axes, tunable)
            gradient = self.gradient(model_with_rates(self.model, tunable.dropouts))
            return self._step(gradient, optimizer, schedule, tunable.ema)(state, batch, seed)

        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        chosen = step if self.updates is None else tuned_step
        return jitted(chosen, self.mesh, (places, replicated(self.mesh)), donate_argnums=0)

    def _step(
        self,
        gradient_of: Gradient,
        optimizer: optax.GradientTransformation,
        schedule: Schedule,
        ema: float | jax.Array | None,
    ) -> Step:
        skip = self.config.train.spike_skip
        return make_train_step(
            self.task, gradient_of, optimizer, schedule, ema=ema, frozen=self.frozen, spike_skip=skip
        )


def open_start(config: RunConfig, note: Note) -> Source | None:
    """The model folder that a run starts from; None: it starts from random parameters.

    Args:
      config: of the run.
      note: called with a line for everything that had to be guessed.

    Raises:
      UserError: there is no such folder, or nothing that this task can start from.
    """
    if config.model.init is None:
        return None
    source = open_source(config.model.init, note, family=config.model.family, arch=config.model.arch, as_shown=True)
    module, fresh = tasks.task(config.task.name), config.model.head == "fresh"
    head = module.Task.head
    if not fresh:
        source.stored_head()
    if source.head == head and not fresh and source.family.HEADS[head].classes == "rows":
        instead = "set model.head=fresh to train another on its encoder, or task.name to the task that it is for"
        refuse_other_problem(
            source.hf_config, source.classes, tasks.problem_of(module), "it cannot be trained further", instead
        )
    check_changes(source, None if fresh else head, note)
    return source


def planned_targets(config: RunConfig, source: Source | None) -> tuple[Facts, Targets]:
    """What a run's model is, and what stands for what it will learn, before any row is read: the labels that are declared, those of
    the folder, or as many as its Config says."""
    family, made = _family_and_config(config, source)
    module = tasks.task(config.task.name)
    head = family.HEADS.get(module.Task.head)
    if head is None or not head.classes:
        return family.facts(made), Targets()
    stored = source.labels if source is not None else None
    numbered = tuple(map(str, range(classes_of(made) or 2)))
    labels = declared_labels(config.data.labels)[0] or stored or numbered
    return family.facts(made), assumed_targets(config, labels)


def assumed_targets(config: RunConfig, labels: tuple[str, ...]) -> Targets:
    """What stands for the targets of a run before any row is read, if its classes have these names: as if each were there once."""
    problem = tasks.problem_of(tasks.task(config.task.name))
    names = (config.data.label,) if problem == REGRESSION else labels  # numbers have the name of their column
    return Targets(names, (1,) * len(names), problem, len(names))


def make_recipe(
    config: RunConfig,
    mesh: Mesh,
    source: Source | None,
    targets: Targets,
    processor: Processor,
    total_steps: int,
    platform: str,
    *,
    tunable: bool = False,
) -> Recipe:
    """The recipe of a run.

    Args:
      source: where weights come from; None: random ones.
      targets: what is learnt of the training rows' labels.
      total_steps: for the schedule.
      platform: of the mesh's devices: ``cpu``, ``gpu`` or ``tpu``.
      tunable: whether the train step takes rates and other numbers as arguments, for this many steps.

    Raises:
      UserError: anything in the configuration that cannot be built on this mesh.
    """
    rules = make_rules(config.mesh)
    module = tasks.task(config.task.name)
    compute = make_compute(config.model, platform, rules, device_kind(mesh))
    family_name, base = _make_model(config, source, module.Task.head, targets.labels, compute)
    task = module.make_task(config.task, targets, base.facts, processor)
    tasks.metric_of(task, config.eval.metric)
    model = adapters.adapted(base, config.model.lora)
    shapes, axes = shapes_and_axes(model)
    check_split(mesh, rules, shapes, axes, config.mesh.replicate)
    schedule = make_schedule(config.optim, total_steps)
    freeze = (
        *config.optim.freeze,
        *adapters.frozen_paths(model, config.model.lora, bool(targets.labels)),
        *_unread(task, shapes),
    )
    values = tunable_of(config.optim, total_steps, total_steps) if tunable else None
    optimizer = _optimizer(config, freeze, schedule, shapes, axes, values)
    shardings = shardings_of(mesh, rules, shapes, axes)
    fields = scored_fields = module.fields(config, processor.pad_id)
    training, scoring = packs(config, module)
    if training:
        fields = packed_fields(fields)
        scored_fields = fields if scoring else scored_fields
        if not tells_texts_apart(base.facts, fields, models.family(family_name).HEADS[base.head]):
            raise UserError(
                f"data.packing={config.data.packing}: models of the family {family_name} give one answer a row, not one for each of its "
                "texts; use none"
            )
    redrawn = _redrawn(config, base, task, shapes, frozen := frozen_mask(shapes, axes, freeze))
    return Recipe(
        config=config,
        mesh=mesh,
        family_name=family_name,
        model=model,
        task=task,
        targets=targets,
        fields=fields,
        scored_fields=scored_fields,
        shapes=shapes,
        axes=axes,
        shardings=shardings,
        schedule=schedule,
        optimizer=optimizer,
        frozen=jax.tree.map(lambda rows: rows is True, frozen),
        state=_state(config, mesh, optimizer, shapes, shardings),
        freeze=freeze,
        redrawn=redrawn,
        updates=total_steps if tunable else None,
        dropouts=(),
    )


def _unread(task: Task, shapes: Shapes) -> tuple[str, ...]:
    """The paths of parameters that the task never reads, which decay would wear away."""
    unread = tuple(getattr(task, "unread", ()))
    return tuple(path for path in paths_of(shapes) if any(f"/{one}/" in f"/{path}/" for one in unread))


def _redrawn(config: RunConfig, base: Model, task: Task, shapes: Shapes, frozen: Tree[Frozen]) -> dict[str, int]:
    """Loaded weights that are drawn afresh, by path in the model without adapters; what the task never reads stays.

    Raises:
      UserError: such a parameter would not train.
    """
    count = config.model.reinit_layers
    if not count:
        return {}
    unread, masks = _unread(task, shapes), paths_of(frozen)
    found: dict[str, int] = {}
    for path, rows in redrawn_rows(base, count).items():
        full = path if path in masks else f"base/{path}"
        if full in unread:
            continue
        mask = masks[full]
        if mask is True or (mask is not False and np.any(np.asarray(mask)[-rows:])):
            why = "optim.freeze" if full == path else "adapters, without it in model.lora.train,"
            raise UserError(
                f"model.reinit_layers={count}: {why} would leave {path} as it was drawn, at random; train it, or leave this out"
            )
        found[path] = rows
    return found


def _optimizer(
    config: RunConfig,
    freeze: tuple[str, ...],
    schedule: Schedule,
    shapes: Shapes,
    axes: Axes,
    tunable: Tunable[jax.Array] | Tunable[np.ndarray] | None,
) -> optax.GradientTransformation:
    return make_optimizer(dataclasses.replace(config.optim, freeze=freeze), schedule, shapes, axes, tunable)


def _state(
    config: RunConfig, mesh: Mesh, optimizer: optax.GradientTransformation, shapes: Shapes, shardings: Shardings
) -> TrainState[jax.ShapeDtypeStruct]:
    with_ema, skips = config.optim.ema is not None, config.train.spike_skip is not None
    shaped = jax.eval_shape(lambda params: init_state(params, optimizer, with_ema, skips), shapes)
    places = state_shardings(shaped, optimizer, shardings, mesh)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shaped, places)


def make_compute(
    config: ModelConfig, platform: str, rules: AxisRules = DEFAULT_RULES, device: str | None = None
) -> Compute:
    """How the model is computed, from the ``model`` section.

    Args:
      platform: of the devices: ``cpu``, ``gpu`` or ``tpu``.
      rules: logical axis names to mesh axes.
      device: kind of the devices, if it is known.
    """
    auto = "float32" if platform == "cpu" else "bfloat16"
    return Compute(
        activation_dtype=auto if config.activation_dtype == "auto" else config.activation_dtype,
        matmul_dtype=auto if config.matmul_dtype == "auto" else config.matmul_dtype,
        param_dtype=config.param_dtype,
        gradient_dtype=config.gradient_dtype,
        layers=config.layers,
        remat=config.remat,
        vocab_tile=config.vocab_tile,
        attention=config.attention,
        dropout_bits=config.dropout_bits,
        known_ids=True,  # check_vocabulary, check_types and check_lengths have seen to it
        padding_last=True,  # collate pads there
        platform=platform,
        device=device,
        rules=rules,
    )


def family_of(config: RunConfig, source: Source | None) -> Family:
    """The family of a run's model."""
    return _family_and_config(config, source)[0]


def _family_and_config(config: RunConfig, source: Source | None) -> tuple[Family, FamilyConfig]:
    if source is not None:
        return source.family, source.config
    if config.model.family is None:
        raise UserError("model.init is not set, so model.family and model.arch must say what to build")
    return models.family(config.model.family), fresh_config(config.model.family, config.model.arch)


def _make_model(
    config: RunConfig, source: Source | None, head: str | None, labels: tuple[str, ...], compute: Compute
) -> tuple[str, Model]:
    """The family's name, and the model."""
    if labels and config.model.arch.get("num_labels", len(labels)) != len(labels):
        raise UserError(
            f"model.arch.num_labels={config.model.arch['num_labels']}, but there are {len(labels)} labels; leave it out"
        )
    family, made = _family_and_config(config, source)
    name = str(config.model.family) if source is None else source.family_name
    if head not in family.HEADS:
        have = ", ".join(str(one) for one in family.HEADS if one is not None)
        raise UserError(f"task.name={config.task.name}: {name} has no head {head!r}, only: {have}")
    return name, family.Model(with_classes(made, len(labels)) if labels else made, head, compute)
