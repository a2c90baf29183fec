"""Experiment trackers behind one small interface: TensorBoard event files and Weights & Biases."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from jaxft.config import LogConfig
from jaxft.errors import UserError
from jaxft.files import write_atomic


class Tracker(Protocol):
    """What receives every scalar of a run."""

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Records values under names like ``train/loss``."""

    def text(self, step: int, name: str, text: str) -> None:
        """Records a text, if it can be shown."""

    def close(self) -> None:
        """Writes what is pending."""


def open_trackers(out: Path, config: LogConfig, *, start_step: int, run_config: Mapping[str, object]) -> list[Tracker]:
    """The trackers that ``config`` asks for.

    Raises:
      UserError: a package is missing, or Weights & Biases cannot start.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(_TensorBoard(out, start_step))
    if config.wandb is not None:
        trackers.append(_Wandb(out, config.wandb, start_step, run_config))
    return trackers


class _TensorBoard:
    """Event files in ``OUT/tensorboard``."""

    def __init__(self, out: Path, start_step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError("log.tensorboard=true needs tensorboardX: pip install tensorboardX") from error
        # TensorBoard hides what an earlier start of this run wrote from purge_step on.
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1 if start_step else 0)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run per run folder, found again on resume by the id kept in ``OUT/wandb.id``."""

    def __init__(self, out: Path, project: str, start_step: int, run_config: Mapping[str, object]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(f"log.wandb={project} needs wandb: pip install wandb") from error
        kept = out / "wandb.id"
        if start_step == 0 or not kept.exists():
            write_atomic(kept, uuid.uuid4().hex[:8] + "\n")
        name = kept.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                project=project, id=name, resume="allow", name=out.name, dir=str(out), config=run_config
            )
        except wandb.errors.Error as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"log.wandb={project}: {reason} (wandb login, or WANDB_MODE=offline)") from error

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        # W&B leaves out steps that it already has; the values that it keeps are the same ones.
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Nothing: of a run's texts, W&B has no table that could be gone on with."""

    def close(self) -> None:
        self._run.finish()
