"""What a run computes, apart from its data: model, task, optimizer, and the train step as one program.

Shapes only, no arrays: a plan for hardware that is not there is made of the same recipe as the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft import lora, models, tasks
from jaxft.config import ModelConfig, RunConfig
from jaxft.data.loader import array_shapes
from jaxft.errors import UserError
from jaxft.initial import shapes_and_axes
from jaxft.layers import Compute
from jaxft.optim import frozen_mask, make_optimizer, make_schedule
from jaxft.pretrained import check_changes
from jaxft.sharding import (
    DEFAULT_RULES,
    AxisRules,
    batch_sharding,
    check_split,
    device_kind,
    jitted,
    make_rules,
    replicated,
    shardings_of,
)
from jaxft.source import Note, Source, make_config, open_source, refuse_other_problems
from jaxft.state import TrainState, init_state, state_shardings
from jaxft.step import make_train_step


@dataclass(frozen=True)
class Recipe:
    """A run without its data."""

    config: RunConfig
    mesh: Mesh
    family_name: str
    model: Any
    task: Any
    shapes: Any
    """Shaped parameter tree."""
    axes: Any
    """Logical axis names of each parameter."""
    shardings: Any
    """Where each parameter lies."""
    schedule: Any
    optimizer: Any
    frozen: Any
    """Tree of bool: which parameters do not train at all; they get no gradient."""
    state: TrainState
    """The training state, as shapes with shardings."""

    def start(self, params: Any) -> TrainState:
        """The state before step 0. Traceable."""
        return init_state(params, self.optimizer, self.config.optim.ema is not None)

    def batch(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch, as shapes with shardings."""
        rules = self.model.compute.rules
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh, rules, len(shape)))
            for name, (shape, dtype) in array_shapes(rows, length, self.config.data.packing != "none").items()
        }

    def seed(self) -> jax.ShapeDtypeStruct:
        """The seed argument of the train step."""
        return jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated(self.mesh))

    def train_program(self) -> Any:
        """The jitted train step ``(state, batch, seed) -> (state, metrics)``; it donates the state."""
        step = make_train_step(
            self.model,
            self.task,
            self.optimizer,
            self.schedule,
            accumulation=self.config.train.accumulation,
            ema=self.config.optim.ema,
            param_shardings=self.shardings if self.mesh.size > 1 else None,
            frozen=self.frozen,
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jitted(step, self.mesh, (places, replicated(self.mesh)), donate_argnums=0)


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
    source = open_source(config.model.init, note, family=config.model.family, arch=config.model.arch)
    fresh, head = config.model.head == "fresh", tasks.task(config.task.name).Task.head
    if not fresh:
        source.stored_head()
    if tasks.task(config.task.name).LABELLED and source.head == head and not fresh:
        instead = "set model.head=fresh to train another on its encoder"
        refuse_other_problems(source.hf_config, source.stored.num_labels, "it cannot be trained further", instead)
    check_changes(source, None if fresh else head, note)
    return source


def make_recipe(
    config: RunConfig,
    mesh: Mesh,
    source: Source | None,
    labels: tuple[str, ...],
    counts: Sequence[int],
    tokenizer: Any,
    total_steps: int,
    platform: str,
) -> Recipe:
    """The recipe of a run.

    Args:
      source: where weights come from; None: random ones.
      labels: of a labelled task, in the order of class ids.
      counts: training rows per label.
      total_steps: for the schedule.
      platform: of the mesh's devices: ``cpu``, ``gpu`` or ``tpu``.

    Raises:
      UserError: anything in the configuration that cannot be built on this mesh.
    """
    rules = make_rules(config.mesh)
    task = tasks.task(config.task.name).make_task(config.task, labels, tuple(counts), tokenizer)
    tasks.metric_of(task, config.eval.metric)
    compute = make_compute(config.model, platform, rules, device_kind(mesh))
    family_name, base = _make_model(config, source, task.head, labels, compute)
    model = lora.adapted(base, config.model.lora)
    shapes, axes = shapes_and_axes(model)
    check_split(mesh, rules, shapes, axes, config.mesh.replicate)
    schedule = make_schedule(config.optim, total_steps)
    freeze = (*config.optim.freeze, *lora.frozen_paths(model, config.model.lora, bool(labels)))
    optimizer = make_optimizer(dataclasses.replace(config.optim, freeze=freeze), schedule, shapes, axes)
    shardings = shardings_of(mesh, rules, shapes, axes)
    return Recipe(
        config=config,
        mesh=mesh,
        family_name=family_name,
        model=model,
        task=task,
        shapes=shapes,
        axes=axes,
        shardings=shardings,
        schedule=schedule,
        optimizer=optimizer,
        frozen=jax.tree.map(lambda rows: rows is True, frozen_mask(shapes, axes, freeze)),
        state=_state(config, mesh, optimizer, shapes, shardings),
    )


def _state(config: RunConfig, mesh: Mesh, optimizer: Any, shapes: Any, shardings: Any) -> TrainState:
    shaped = jax.eval_shape(lambda params: init_state(params, optimizer, config.optim.ema is not None), shapes)
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
        platform=platform,
        device=device,
        rules=rules,
    )


def _make_model(
    config: RunConfig, source: Source | None, head: str, labels: tuple[str, ...], compute: Compute
) -> tuple[str, Any]:
    classes: dict[str, Any] = {"num_labels": len(labels)} if labels else {}
    if labels and config.model.arch.get("num_labels", len(labels)) != len(labels):
        raise UserError(
            f"model.arch.num_labels={config.model.arch['num_labels']}, but there are {len(labels)} labels; leave it out"
        )
    if source is None and config.model.family is None:
        raise UserError("model.init is not set, so model.family and model.arch must say what to build")
    name = str(config.model.family) if source is None else source.family_name
    family = models.family(name)
    if head not in family.HEADS:
        have = ", ".join(str(one) for one in family.HEADS if one is not None)
        raise UserError(f"task.name={config.task.name}: {name} has no head {head!r}, only: {have}")
    if source is None:
        return name, family.Model(make_config(family, {**config.model.arch, **classes}), head, compute)
    # A decoded Config holds dataclasses, and is changed by its fields: it is no tree to be decoded.
    return name, family.Model(dataclasses.replace(source.config, **classes), head, compute)
