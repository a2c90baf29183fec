"""What a run's time went to, how fast its steps are, and traces of single ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import jax
from jaxtyping import PyTree

from jaxft.data.batch import Shape
from jaxft.files import write_atomic
from jaxft.machine.chips import peak_of
from jaxft.machine.memory import device_bytes
from jaxft.reporting.sinks import Clock
from jaxft.training.flops import UsefulFlops
from jaxft.training.recipe import Recipe
from jaxft.training.setup import Times

T = TypeVar("T")

_WIDTH = 100
"""Columns of the summary line."""


class Goodput:
    """Seconds by cause, from the start of the program to the end of a run; what no cause claims was spent in steps.

    Args:
      before: seconds by cause until the first step.
    """

    def __init__(self, before: Times) -> None:
        self._before, self._times = dict(before.seconds), Times()
        self._began = time.perf_counter()
        self.part = self._times.part

    def elapsed(self) -> float:
        """Seconds since the first step."""
        return time.perf_counter() - self._began

    def causes(self, waited: float) -> dict[str, float]:
        """Seconds by cause, with steps and waiting for data.

        Args:
          waited: seconds spent waiting for data.
        """
        since = time.perf_counter() - self._began
        inside = {"evaluation": 0.0, "checkpoint": 0.0, **self._times.seconds}
        steps = max(since - waited - sum(inside.values()), 0.0)
        before = {name: seconds + inside.pop(name, 0.0) for name, seconds in self._before.items()}
        return {**before, "steps": steps, "waiting for data": waited, **inside}

    def finish(self, out: Path, waited: float) -> str:
        """Writes ``goodput.json`` and returns the summary line."""
        causes = self.causes(waited)
        total = max(sum(causes.values()), 1e-9)
        write_atomic(
            out / "goodput.json", json.dumps({"seconds": causes, "goodput": causes["steps"] / total}, indent=2) + "\n"
        )
        line = f"goodput {100 * causes['steps'] / total:.0f} % of {total:.1f} s:"
        for seconds, name in sorted(((seconds, name) for name, seconds in causes.items()), reverse=True):
            part = f" {name} {100 * seconds / total:.0f} %,"
            # The small ones that the console has no room for are in goodput.json.
            if seconds >= 0.005 * total and len(line + part) <= _WIDTH:
                line += part
        return line.rstrip(",")


class Profile:
    """A trace of the steps that ``train.profile`` names.

    Args:
      span: ``START:STOP`` or None.
      folder: where it goes.
    """

    def __init__(self, span: str | None, folder: Path) -> None:
        self._first, self._last = (0, -1) if span is None else tuple(int(part) for part in span.split(":"))
        self.folder, self._running = folder, False

    def before(self, step: int) -> None:
        """To be called before a step (counted from 1) is sent off."""
        if step == self._first:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def after(self, step: int, result: PyTree[jax.Array]) -> bool:
        """To be called after it; whether the trace has just been written. Waits for the devices at its last step."""
        if not self._running or step != self._last:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that a stop has cut short."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


@dataclass
class Lap:
    """What happened since the last log line."""

    useful: UsefulFlops | None
    peak: float | None
    clock: Clock = field(default_factory=Clock)
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0

    def add(self, rows: int, tokens: int, shape: Shape) -> None:
        """Counts a step."""
        self.clock.steps += 1
        self.steps, self.rows, self.tokens = self.steps + 1, self.rows + rows, self.tokens + tokens
        if self.useful is not None:
            self.flops += self.useful.of(shape, tokens)

    def speeds(self) -> dict[str, float]:
        """Speeds since the last call, and the device's memory where it is known."""
        speeds = self.clock.lap(self.steps, self.rows, self.tokens, self.flops, self.peak)
        self.steps = self.rows = self.tokens = 0
        self.flops = 0.0
        held = device_bytes()
        return speeds if held is None else speeds | {"device_gib": held / 2**30}


def lap_of(recipe: Recipe) -> Lap:
    """The first lap of a run. MFU is known where the peak of its devices is."""
    one = peak_of(jax.devices()[0].device_kind)
    return Lap(None, None) if one is None else Lap(UsefulFlops(recipe), one * jax.device_count())


def timed(batches: Iterator[T], clock: Clock) -> Iterator[T]:
    """The same batches; the time spent waiting for each is told to the clock."""
    while True:
        with clock.waiting():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
