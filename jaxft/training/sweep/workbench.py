"""What the trials of a sweep share in one process: encoded rows, weights as they were read, compiled steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import tasks
from jaxft.config import RunConfig, to_tree
from jaxft.data.batch import Shape
from jaxft.data.processors.contract import Processor
from jaxft.files import JsonObject
from jaxft.hub.source import Note, Source
from jaxft.hub.weights import Weights
from jaxft.hub.weights.held import Held
from jaxft.models.rates import chosen_rates, model_with_rates, with_rates
from jaxft.parallel.sharding import replicated
from jaxft.training.optim import make_schedule
from jaxft.training.optim.tunable import NUMBER_KEYS, SCHEDULE_KEYS, Tunable, tunable_of
from jaxft.training.programs import Programs, compile_programs
from jaxft.training.recipe import open_start
from jaxft.training.rows import Rows, open_rows
from jaxft.training.setup import Setup, Times, prepare, steps_of, steps_per_epoch

RUN_TIME_KEYS = (
    *(f"optim.{key}" for key in SCHEDULE_KEYS),
    *("optim.weight_decay", "optim.clip_norm", "optim.ema"),
    *("train.seed", "train.steps", "train.epochs", "train.log_every", "train.max_nonfinite", "train.out"),
    "train.rollbacks",
    *("eval.every", "eval.patience"),
)
"""Keys that change no program: trials that differ in these alone share one compiled step. Whether ``optim.clip_norm`` and
``optim.ema`` are there at all does change it. Nor do rates of dropout that vary (:func:`varied_rates`), where each has a number."""


def varied_rates(configs: Iterable[RunConfig]) -> frozenset[str]:
    """Fields of ``model.arch`` that are rates of dropout (:mod:`jaxft.models.rates`) and not the same in all runs that set them.

    Others stay constants: a step whose rate is an argument makes random bits even if it is 0.
    """
    values: dict[str, set[float]] = {}
    for config in configs:
        for name, rate in chosen_rates(config.model.arch).items():
            values.setdefault(name, set()).add(rate)
    return frozenset(name for name, found in values.items() if len(found) > 1)


def rates_of(config: RunConfig, varied: Collection[str]) -> dict[str, float]:
    """The rates that are arguments in the programs of a run."""
    return {name: rate for name, rate in sorted(chosen_rates(config.model.arch).items()) if name in varied}


def _without_rates(tree: JsonObject, rates: Collection[str]) -> JsonObject:
    """A ``model`` section in which it is only said that these rates are set."""
    return tree | {"arch": tree["arch"] | dict.fromkeys(rates, "an argument")}


def program_key(config: RunConfig, varied: Collection[str] = ()) -> str:
    """What the programs of a run depend on; equal for runs that share them.

    Args:
      varied: rates of dropout that are arguments (:func:`varied_rates`). Whether they are set does change programs.
    """
    tree: JsonObject = to_tree(config)
    tree["model"] = _without_rates(tree["model"], rates_of(config, varied))
    for key in RUN_TIME_KEYS:
        section, name = key.split(".")
        del tree[section][name]
    tree["optim"] |= {name: getattr(config.optim, name) is not None for name in NUMBER_KEYS}
    return json.dumps(tree, sort_keys=True)


@dataclass(frozen=True)
class HeldSource(Source):
    """A model folder whose weights are read once."""

    held: Held | None = None

    def open(self) -> Weights:
        """The weights, in memory as far as they have been read."""
        assert self.held is not None
        return self.held


class Bound(Mapping[Shape, Callable[..., Any]]):
    """Train steps with the numbers of one trial: they are called as those of an ordinary run."""

    def __init__(self, programs: Mapping[Shape, Callable[..., Any]], values: Tunable[jax.Array]) -> None:
        self._programs, self._values = programs, values

    def __getitem__(self, shape: Shape) -> Callable[..., Any]:
        program = self._programs[shape]
        return lambda state, batch, seed: program(state, batch, seed, self._values)

    def __iter__(self) -> Iterator[Shape]:
        return iter(self._programs)

    def __len__(self) -> int:
        return len(self._programs)


@dataclass(frozen=True)
class Group:
    """Trials that share their programs."""

    setup: Setup
    programs: Programs
    values: dict[str, Tunable[np.ndarray]] = field(default_factory=dict)
    """The numbers of the latest trial, by what they follow from."""

    def trial(self, config: RunConfig, out: Path, seed: int) -> tuple[Setup, Programs]:
        """Setup and programs of one trial, for :func:`jaxft.training.loop.fit`.

        Raises:
          UserError: settings that describe no schedule.
        """
        setup, updates = self.setup, self.setup.updates
        assert updates is not None
        total = steps_of(config, setup.train)
        config = dataclasses.replace(
            config,
            data=setup.config.data,  # with what "auto" came to
            train=dataclasses.replace(config.train, out=str(out), seed=seed, export=False),
            log=dataclasses.replace(config.log, progress="off"),
            checkpoint=dataclasses.replace(config.checkpoint, keep=1, resume="auto"),
        )
        rates = rates_of(config, setup.dropouts)
        own = dataclasses.replace(
            setup,
            config=config,
            source=_source_with(setup.source, rates),
            model=model_with_rates(setup.model, rates),
            schedule=make_schedule(config.optim, total),
            total_steps=total,
            eval_every=config.eval.every or steps_per_epoch(config, setup.train),
        )
        key = json.dumps([to_tree(config.optim), total, rates])
        if key not in self.values:
            self.values.clear()  # seeds of one point follow each other
            self.values[key] = tunable_of(config.optim, total, updates, rates)
        values = jax.device_put(self.values[key], replicated(setup.mesh))
        return own, dataclasses.replace(self.programs, train=Bound(self.programs.train, values))

    def compiled(self) -> tuple[int, int]:
        """(train steps that were compiled, batch shapes that there are)."""
        ready = [self.programs.compilation.ready("train", shape) for shape in self.programs.train]
        return sum(ready), len(ready)


def _source_with(source: Source | None, rates: Mapping[str, float]) -> Source | None:
    """The folder with other rates among the changes to its Config."""
    if source is None:
        return None
    config, changes = with_rates(source.config, rates), {**source.changes, **rates}
    return dataclasses.replace(source, config=config, changes=changes)


@dataclass
class Workbench:
    """Makes setups and programs, and keeps what they share.

    Args:
      note: takes lines about data, model and compilation; none twice.
      varied: rates of dropout that are arguments of programs (:func:`varied_rates`).
    """

    note: Note
    varied: frozenset[str] = frozenset()
    groups: dict[str, Group] = field(default_factory=dict)
    _rows: dict[str, Rows] = field(default_factory=dict)
    _sources: dict[str, Source | None] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def check(self, config: RunConfig) -> None:
        """Opens the model folder of a trial, whose weights stay unread: the first of a group may come late.

        Raises:
          UserError: ``model.arch`` says what no model of the folder can be.
        """
        self._start(config, self._say)

    def group(self, key: str, config: RunConfig, alike: Sequence[RunConfig], sure: Sequence[RunConfig]) -> Group:
        """The setup and programs of a trial.

        Args:
          key: :func:`program_key` of its configuration.
          alike: configurations of trials that may share them; the longest says how many rates there is room for.
          sure: those that will be run.

        Raises:
          UserError: a run of ``sure`` cannot be made.
        """
        if key not in self.groups:
            setup = prepare(config, self._say, Times(), open_start=self._start, open_rows=self._open, tunable=True)
            for one in sure:
                make_schedule(one.optim, steps_of(one, setup.train))
            most = max(steps_of(one, setup.train) for one in (config, *alike))
            setup = dataclasses.replace(setup, updates=most, dropouts=tuple(rates_of(config, self.varied)))
            self.groups[key] = Group(setup, compile_programs(setup, self._say))
        return self.groups[key]

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.note(line)

    def _start(self, config: RunConfig, note: Note) -> Source | None:
        rates = rates_of(config, self.varied)
        key = json.dumps(_without_rates(to_tree(config.model), rates)) + config.task.name
        if key not in self._sources:
            source = open_start(config, note)
            if source is not None:
                fields = {one.name: getattr(source, one.name) for one in dataclasses.fields(Source)}
                source = HeldSource(**fields, held=Held(source.open()))
            self._sources[key] = source
        return _source_with(self._sources[key], rates)

    def _open(
        self, config: RunConfig, module: tasks.TaskModule, processor: Processor, source: Source | None, note: Note
    ) -> Rows:
        tree = to_tree(config)
        key = json.dumps([tree["task"], tree["data"], tree["model"]["init"], tree["model"]["head"]])
        if key not in self._rows:
            self._rows[key] = open_rows(config, module, processor, source, note)
        return self._rows[key]
