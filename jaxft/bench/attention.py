"""The attention benchmark: every contender of a case takes turns, so that a change of the machine's speed hits all alike."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxft.bench.attention_case import TORCH, Case
from jaxft.bench.workers import Worker, available_memory
from jaxft.errors import UserError
from jaxft.files import JsonObject

PASSES = ("forward", "both")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one pass."""

    median: float
    least: float
    most: float
    count: int


@dataclass(frozen=True)
class Result:
    """What was measured in one case."""

    case: Case
    backend: str
    """That was run: what ``auto`` chose, else the one asked for."""
    device: str
    platform: str
    forward: Timing
    both: Timing
    compile_seconds: float
    peak_bytes: int | None
    """The most that both passes needed beyond inputs and program; None: the system does not tell."""
    matmul_peak: float
    """FLOP/s of a 2048-cubed matmul of the same operand type, the best of the contenders of its case."""

    def flops(self, passes: str) -> float:
        """Useful FLOP/s."""
        return self.case.flops(passes) / (1e-3 * getattr(self, passes).median)


Note = Callable[[str], None]


def run_cases(groups: Sequence[Sequence[Case]], turns: int, turn_seconds: float, note: Note) -> list[Result]:
    """Results of groups of cases that differ by contender only; those that cannot run are told and left out."""
    results = []
    for group in groups:
        if not any(case.backend not in TORCH for case in group):
            continue
        results += _run_group(group, turns, turn_seconds, note)
    return results


def _run_group(group: Sequence[Case], turns: int, turn_seconds: float, note: Note) -> list[Result]:
    contenders: list[_Contender] = []
    try:
        for case in group:
            contender = _started(case, note)
            if contender is None:
                continue
            contenders.append(contender)
            if contender.about["platform"] != "cpu":  # one process at a time has an accelerator
                contender.take_turns(turns, turn_seconds)
                contender.close()
        on_cpu = [c for c in contenders if c.about["platform"] == "cpu"]
        for _ in range(turns):
            for contender in on_cpu:
                contender.take_turns(1, turn_seconds)
                time.sleep(0.02)  # worker threads of the one before spin for a while
    finally:
        for contender in contenders:
            contender.close()
    peak = max((c.about["peak_flops"] for c in contenders), default=0.0)
    return [contender.result(peak) for contender in contenders]


def _started(case: Case, note: Note) -> _Contender | None:
    free, needed = available_memory(), case.needed_bytes()
    if free is not None and needed > 0.8 * free:
        note(f"{_name(case)}: left out, may need {needed / 2**30:.1f} GiB of {free / 2**30:.1f} that are free")
        return None
    try:
        return _Contender(case)
    except UserError as error:
        note(f"{_name(case)}: left out: {error}")
        return None


def _name(case: Case) -> str:
    return f"{case.backend} at {case.length}"


class _Contender:
    def __init__(self, case: Case) -> None:
        self.case = case
        # One accelerator's memory is not for the first process alone.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-m", "jaxft.bench.attention_case", json.dumps(dataclasses.asdict(case))]
        self._worker = Worker(case.backend, command, environment)
        self.seconds: dict[str, list[float]] = {name: [] for name in PASSES}
        self.peak: int | None = None
        try:
            self.about = self._worker.read()
            if "error" in self.about:
                raise UserError(self.about["error"])
        except UserError:
            self._worker.close()
            raise
        self._counts: dict[str, int] = {}

    def take_turns(self, turns: int, turn_seconds: float) -> None:
        for _ in range(turns):
            for name in PASSES:
                if name not in self._counts:  # one that does not count, and says how many make a turn
                    (once,) = self._worker.ask(f"{name} 1")["seconds"]
                    self._counts[name] = min(max(1, round(turn_seconds / once)), 200)
                answer = self._worker.ask(f"{name} {self._counts[name]}")
                self.seconds[name] += answer["seconds"]
                self.peak = answer["peak_bytes"]

    def result(self, matmul_peak: float) -> Result:
        def timing(name: str) -> Timing:
            ms = sorted(1e3 * seconds for seconds in self.seconds[name])
            return Timing(statistics.median(ms), ms[0], ms[-1], len(ms))

        return Result(
            case=self.case,
            backend=self.about["backend"],
            device=self.about["device"],
            platform=self.about["platform"],
            forward=timing("forward"),
            both=timing("both"),
            compile_seconds=self.about["compile_seconds"],
            peak_bytes=self.peak,
            matmul_peak=matmul_peak,
        )

    def close(self) -> None:
        self._worker.close()


def to_json(result: Result) -> JsonObject:
    """Plain data."""
    return dataclasses.asdict(result)


def from_json(tree: JsonObject) -> Result:
    """Back from :func:`to_json`."""
    fields: JsonObject = dict(tree)
    for name in PASSES:
        fields[name] = Timing(**tree[name])
    fields["case"] = Case(**tree["case"])
    return Result(**fields)
