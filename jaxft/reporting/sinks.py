"""Where the numbers of a run go while it runs: console, JSONL files, TensorBoard, Weights & Biases.

``log.jsonl`` holds only what seed and step determine, so that a run that was stopped and resumed leaves the same bytes
as one that never stopped. Everything that a clock has touched goes to ``timing.jsonl``.

With several processes, only the first one opens sinks: two writers would spoil each other's files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, SupportsFloat

from jaxft.config import LogConfig
from jaxft.errors import not_written
from jaxft.files import JsonObject
from jaxft.reporting.records import LineFile, read_log, to_json
from jaxft.reporting.samples_text import SAMPLES, samples_text
from jaxft.reporting.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Clock", "Kind", "Silent", "Sinks", "open_sinks", "read_log"]

Kind = Literal["train", "eval"]

_WIDTH = 100
"""Columns of a console line."""
_SHORT = {"learning_rate": "rate", "grad_norm": "norm"}
_SHOWN_WHEN_NOT_ZERO = ("skipped", "spikes", "streak")
# Of a step's speeds, the console has room for these; timing.jsonl has all.
_SHOWN_SPEEDS = ("rows_per_s", "mfu_percent", "wait_percent", "tokens_per_s")
_WAIT_WORTH_A_WORD = 5.0


class Sinks:
    """The open sinks of one run; made by :func:`open_sinks`."""

    def __init__(
        self,
        log: LineFile,
        timing: LineFile,
        samples: LineFile | None,
        trackers: list[Tracker],
        bar: tqdm | None,
        total_steps: int,
        say: Callable[[str], None],
    ) -> None:
        self._log, self._timing, self._samples, self._trackers, self._say = log, timing, samples, trackers, say
        self._bar, self._total_steps = bar, total_steps
        self._speeds: tuple[int, dict[str, float]] = (-1, {})
        self._postfix: dict[str, str] = {}

    def log(self, step: int, kind: Kind, values: Mapping[str, SupportsFloat]) -> None:
        """Records values that seed and step determine: no clock, no speeds.

        Speeds that :meth:`timing` got for the same step before are shown on the same console line.
        """
        plain = _numbers(values)
        self._log.append({"step": step, "kind": kind} | to_json(plain))
        self._track(step, kind, plain)
        speeds = _worth_showing(self._speeds[1]) if kind == "train" and self._speeds[0] == step else {}
        if kind == "train" and "loss" in plain:
            self._postfix["loss"] = _shown("loss", plain["loss"])
        self.note("\n".join(_console_lines(step, self._total_steps, kind, plain, speeds)))

    def samples(self, step: int, samples: Sequence[JsonObject]) -> None:
        """Records texts that the model has written: ``prompt``, ``text`` and, if a row says so, what is ``wanted``."""
        if self._samples is None or not samples:
            return
        for one in samples:
            self._samples.append({"step": step, **one})
        shown = "\n".join(
            f"{name}: {one[name]}  " if name in one else "" for one in samples for name in ("prompt", "text", "wanted")
        )
        for tracker in self._trackers:
            tracker.text(step, "samples", shown)
        self.note(samples_text(samples, _WIDTH))

    def timing(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Records speeds and waiting times; the console shows them with the next train log of the same step."""
        plain = _numbers(values)
        self._timing.append({"step": step} | to_json(plain))
        self._track(step, "timing", plain)
        self._speeds = (step, plain)
        if "rows_per_s" in plain:
            self._postfix["rows/s"] = _shown("rows_per_s", plain["rows_per_s"])

    def note(self, text: str) -> None:
        """One line on the console, above the progress bar if there is one."""
        if self._bar is None:
            self._say(text)
        else:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, step: int) -> None:
        """Moves the progress bar to ``step`` steps done."""
        if self._bar is not None:
            postfix = ", ".join(f"{name} {text}" for name, text in self._postfix.items())
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(step - self._bar.n)

    def sync(self) -> None:
        """Puts the log on the disk. To be called before each checkpoint: no line up to it can then be lost."""
        for file in self._files():
            file.sync()

    def written(self) -> JsonObject:
        """What ``log.jsonl`` should hold from now on, for a checkpoint to keep (:func:`jaxft.reporting.records.log_said`)."""
        return self._log.written()

    def close(self) -> None:
        """Closes everything; a second call does nothing."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close()
        for file in self._files():
            file.close()

    def _files(self) -> list[LineFile]:
        return [self._log, self._timing, *([] if self._samples is None else [self._samples])]

    def _track(self, step: int, group: str, values: Mapping[str, float | int]) -> None:
        for tracker in self._trackers:
            tracker.scalars(step, {f"{group}/{name}": value for name, value in values.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Silent(Sinks):
    """The sinks of a process that is not the first: nothing is written."""

    def __init__(self) -> None:
        """Opens nothing."""

    def log(self, step: int, kind: Kind, values: Mapping[str, SupportsFloat]) -> None:
        """Nothing."""

    def samples(self, step: int, samples: Sequence[JsonObject]) -> None:
        """Nothing."""

    def timing(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def written(self) -> JsonObject:
        """Nothing: only the first process stores it."""
        return {}

    def close(self) -> None:
        """Nothing."""


def _print(text: str) -> None:
    print(text, flush=True)


def open_sinks(
    out: Path,
    config: LogConfig,
    *,
    start_step: int,
    total_steps: int,
    run_config: Mapping[str, object],
    say: Callable[[str], None] = _print,
) -> Sinks:
    """Opens all sinks of a run in the folder ``out``.

    Args:
      start_step: optimizer steps done so far; what the logs hold beyond them is dropped (at 0: everything).
      total_steps: the last planned step.
      run_config: the resolved configuration as plain dicts, for Weights & Biases.
      say: what puts a line on the console.

    Raises:
      UserError: the folder cannot be written, or a package is missing.
    """
    with ExitStack() as undo:
        try:
            out.mkdir(parents=True, exist_ok=True)
            trackers = open_trackers(out, config, start_step=start_step, run_config=run_config)
            for tracker in trackers:
                undo.callback(tracker.close)
            log = LineFile(out / "log.jsonl", start_step)
            undo.callback(log.close)
            timing = LineFile(out / "timing.jsonl", start_step)
            undo.callback(timing.close)
            kept = out / SAMPLES
            # What a run wrote before it was told to write no more is cut, too.
            wanted = bool(config.samples or config.prompts) or kept.exists()
            samples = LineFile(kept, start_step) if wanted else None
        except OSError as error:
            raise not_written(error.filename or out, error) from error
        undo.pop_all()
    live = config.progress == "on" or (config.progress == "auto" and sys.stderr.isatty())
    bar = _open_bar(start_step, total_steps) if live else None
    sinks = Sinks(log, timing, samples, trackers, bar, total_steps, say)
    for line in (*log.warnings, *(line for line in timing.warnings if start_step)):
        sinks.note(line)
    return sinks


def _open_bar(start_step: int, total_steps: int) -> tqdm:
    from tqdm import tqdm

    layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
    return tqdm(
        total=total_steps, initial=start_step, bar_format=layout, file=sys.stderr, dynamic_ncols=True, leave=False
    )


def _numbers(values: Mapping[str, SupportsFloat]) -> dict[str, float | int]:
    """Python numbers of what a device or numpy handed over."""
    plain: dict[str, float | int] = {}
    for name, value in values.items():
        number = value.item() if hasattr(value, "item") else value
        if name in ("step", "kind") or isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"cannot log {name}={value!r}: a number under a name other than step and kind is needed")
        plain[name] = number
    return plain


def _worth_showing(speeds: Mapping[str, float | int]) -> dict[str, float | int]:
    shown = {name: speeds[name] for name in _SHOWN_SPEEDS if name in speeds}
    if shown.get("wait_percent", 0.0) < _WAIT_WORTH_A_WORD:
        shown.pop("wait_percent", None)
    return shown


def _console_lines(
    step: int, total: int, kind: str, values: Mapping[str, float | int], speeds: Mapping[str, float | int]
) -> list[str]:
    """One line, or more where the values need it; of the speeds, those that the last line still has room for."""
    lines = [f"{kind:<5} {step:>{len(str(total))}}/{total}"]
    indent = " " * len(lines[0])
    for name, value in {**values, **speeds}.items():
        if not value and name in _SHOWN_WHEN_NOT_ZERO:
            continue
        part = f" | {_name(name)} {_shown(name, value):>6}"
        if len(lines[-1]) + len(part) <= _WIDTH:
            lines[-1] += part
        elif name in speeds:
            break
        else:
            lines.append(indent + part)
    return lines


def _name(name: str) -> str:
    return _SHORT.get(name, name).replace("_per_s", "/s").removesuffix("_percent").replace("_", " ")


def _shown(name: str, value: float | int) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if name == "learning_rate":
        return f"{value:.2e}"
    if name.endswith("_percent"):
        return f"{value:.1f}%"
    if name.endswith("_per_s"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if name == "epoch":
        return f"{value:.2f}"
    # Losses and scores near 1 in four decimals; large numbers (speeds) without any; small ones in three digits.
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"


class Clock:
    """Speeds between log lines, from counts and a monotonic clock.

    ``waiting()`` wraps the request for the next batch, ``paused()`` what is not training (evaluation, checkpoints,
    compilation).
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start, self._waited, self._paused = now(), 0.0, 0.0
        self.waited = 0.0
        """Seconds spent waiting for data in all laps."""
        self.steps = 0
        """Steps done in all laps."""
        self.resting = 0
        """More than 0 while what is under way is no training."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        begin = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - begin
            self.waited += self._now() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of the lap."""
        begin = self._now()
        self.resting += 1
        try:
            yield
        finally:
            self.resting -= 1
            self._paused += self._now() - begin

    def lap(
        self, steps: int, rows: int, tokens: int, flops: float | None = None, peak: float | None = None
    ) -> dict[str, float]:
        """Speeds since the last lap, and a new lap begins.

        Args:
          steps: of the lap.
          rows: rows trained on in this lap; those that only fill up a batch do not count.
          tokens: their tokens, without padding.
          flops: useful ones, of ``peak`` per second: their share is the MFU.
        """
        now = self._now()
        # A clock may stand still over a lap of no work; no lap lasts less than its resolution.
        seconds = max(now - self._start - self._paused, 1e-9)
        speeds = {
            "rows_per_s": rows / seconds,
            "tokens_per_s": tokens / seconds,
            "step_ms": 1e3 * seconds / max(steps, 1),
            "wait_percent": 100.0 * self._waited / seconds,
            "seconds": seconds,
        }
        if flops is not None and peak is not None:
            speeds["mfu_percent"] = 100.0 * flops / seconds / peak
        self._start, self._waited, self._paused = now, 0.0, 0.0
        return speeds
