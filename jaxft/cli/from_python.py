"""Training from Python: :func:`train` does what ``jaxft train`` does, and says what came of it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from jaxft.checkpoint import run_folder
from jaxft.config import RunConfig, load_config, to_tree
from jaxft.errors import UserError
from jaxft.files import JsonObject

if TYPE_CHECKING:  # a run file is read, and refused, before jax is imported
    from jax import Array
    from jaxtyping import PyTree

    from jaxft.data.processors.tokenizer import Tokenizer
    from jaxft.inference.predict import Served
    from jaxft.models.contract import Model


@dataclass(frozen=True)
class Trained:
    """What :func:`train` gives."""

    folder: Path
    """The run's: config, log, checkpoints, report, export; of a run in a bucket the folder of this machine."""
    config: RunConfig
    """The resolved configuration."""
    metrics: JsonObject
    """Scores of the best parameters on the held-out rows; means over several seeds; empty where the run was stopped."""
    test: JsonObject = field(default_factory=dict)
    """Scores of the same parameters on the rows of the test, likewise; empty where there is none."""
    interrupted: bool = False
    """Whether it was told to stop: the same call goes on from there."""
    seeds: dict[int, Trained] = field(default_factory=dict)
    """By seed, where ``train.seeds`` asks for several."""

    @functools.cached_property
    def served(self) -> Served:
        """The best model, opened as ``jaxft predict`` opens it: ``model``, ``params``, ``tokenizer``, ``labels``."""
        from jaxft.inference.predict import open_model

        return open_model(str(self.folder), [], lambda text: None)

    @property
    def model(self) -> Model:
        """The best model; adapters merged in."""
        return self.served.model

    @property
    def params(self) -> PyTree[Array]:
        """Its parameters."""
        return self.served.params

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return self.served.tokenizer

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of class ids; empty without classes."""
        return self.served.labels


def train(
    config: RunConfig | str | Path | Mapping[str, object] | None = None,
    task: str | ModuleType | None = None,
    *,
    family: str | ModuleType | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Trained:
    """Fine-tunes as ``jaxft train`` does: same folder, same log, resumed if the folder holds a part of this run.

    Args:
      config: a run file, its content as nested dicts, or a :class:`jaxft.RunConfig`; None: the defaults.
      task: ``task.name``: one of jaxft's, or a module of one's own (docs/add_a_task.md), itself or by its dotted name.
      family: ``model.family``, likewise (docs/add_a_model.md).
      overrides: ``key=value`` pairs, which win.
      quiet: print nothing.

    Raises:
      UserError: anything in configuration, data or model folder that cannot work.

    Example:
      >>> run = jaxft.train("configs/runs/wordnet8_minilm.yaml", overrides=["train.steps=50"])
      >>> run.metrics["accuracy"], run.folder / "export"
    """
    named = [
        f"{key}={_name(value)}" for key, value in (("task.name", task), ("model.family", family)) if value is not None
    ]
    resolved = _resolved(config, [*named, *overrides])
    from jaxft.cli import train as command

    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        code = command._run(resolved)
    return _result(resolved, interrupted=code == 130)


def _name(value: str | ModuleType) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, ModuleType):
        raise UserError(f"{value!r}: give a module, or its dotted name; a run keeps the name, to find it again")
    if value.__name__ == "__main__":
        raise UserError(
            "a task or family must lie in a module of its own, which later runs can import, not in a script"
        )
    return value.__name__.removeprefix("jaxft.tasks.").removeprefix("jaxft.models.families.")


def _resolved(config: RunConfig | str | Path | Mapping[str, object] | None, overrides: list[str]) -> RunConfig:
    if config is None or isinstance(config, str | Path):
        return load_config(None if config is None else str(config), overrides)
    if not isinstance(config, RunConfig | Mapping):
        raise UserError(f"config: expected a run file, nested dicts or a RunConfig, found {type(config).__name__}")
    tree = to_tree(config) if isinstance(config, RunConfig) else dict(config)
    with tempfile.TemporaryDirectory() as folder:  # a run file is what is read strictly, and overridden
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
        return load_config(str(path), overrides)


def _result(config: RunConfig, *, interrupted: bool) -> Trained:
    out = run_folder(config.train.out)
    if interrupted:
        return Trained(out, config, {}, interrupted=True)
    tested = config.data.test is not None or config.data.test_fraction is not None
    if not config.train.seeds:
        return _scored(out, config, tested)
    seeds = {seed: _scored(out / f"seed{seed}", config, tested) for seed in config.train.seeds}
    if len(seeds) == 1:
        (one,) = seeds.values()
        return Trained(out, config, dict(one.metrics), dict(one.test), seeds=seeds)
    return Trained(
        out, config, _means(out / "seeds.json"), _means(out / "seeds_test.json") if tested else {}, seeds=seeds
    )


def _scored(folder: Path, config: RunConfig, tested: bool) -> Trained:
    return Trained(
        folder, config, _read(folder / "metrics.json"), _read(folder / "metrics_test.json") if tested else {}
    )


def _means(path: Path) -> JsonObject:
    return {name: found["mean"] for name, found in _read(path)["metrics"].items()}


def _read(path: Path) -> JsonObject:
    return json.loads(path.read_text(encoding="utf-8"))
