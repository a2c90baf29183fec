"""kill -9 at random moments of a run: start-up, compilation, steps, saves, deletions, restoring, report and export.

A run is killed several times and then left to end. No step that was stored and named may be lost, and what the run leaves must be
what an undisturbed one leaves, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .course import Course, differing, said, sealed, trace_of, wait_until
from .report import Report

_EACH = 5  # kills of one run, before it is left to end
_LONGEST = 120.0  # seconds that anything may take


def run(course: Course, count: int, seed: int, workers: int = 2) -> Report:
    """Kills runs so many times in all."""
    report = Report("kills")
    runs = [(number, min(_EACH, count - number * _EACH)) for number in range(-(-count // _EACH))]

    def one(item: tuple[int, int]) -> list[tuple[str, str | None]]:
        number, kills = item
        return _killed(course, course.folder / f"killed-{number}", kills, random.Random(f"{seed} {number}"))

    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(one, runs):
            for kind, problem in found:
                report.count(kind, problem)
    return report


def _killed(course: Course, out: Path, kills: int, rng: random.Random) -> list[tuple[str, str | None]]:
    """The kind of each kill of one run, and what was wrong after it."""
    found: list[tuple[str, str | None]] = []
    while len(found) < kills:
        before = sealed(out)
        process = course.start(out)
        phase, stored = _kill(process, out, before, course.seconds, rng)
        if phase is None:
            break  # it had ended before
        after = sealed(out)
        lost = bool(stored) and (not after or after[-1] < stored[-1])
        found.append((phase, f"step {stored[-1]} is lost, there are {after}" if lost else None))
    problem = _ended(course, out)
    found = [(kind, wrong or problem) for kind, wrong in found]
    left = kills - len(found)
    return found + (_killed(course, out.with_name(f"{out.name}'"), left, rng) if left else [])


def _kill(
    process: subprocess.Popen[str], out: Path, before: list[int], seconds: float, rng: random.Random
) -> tuple[str | None, list[int]]:
    """Kills at a moment of any kind; what the run was at (None: it had ended), and the steps that were stored just before."""
    log, began = out / "log.jsonl", time.time()
    size = log.stat().st_size if log.exists() else 0
    moments: dict[str, Callable[[], bool]] = {
        "a save": lambda: any((out / "checkpoints").glob(".saving-*")),
        "a deletion": lambda: any((out / "checkpoints").glob(".deleting-*")),
        "a step": lambda: log.exists() and log.stat().st_size != size,
        "the report": lambda: (out / "metrics.json").exists() and (out / "metrics.json").stat().st_mtime > began,
        "the export": lambda: any(out.glob(".export.*")),
    }
    aim = rng.choice(["", "", *moments])
    if aim:
        hit = wait_until(moments[aim], process, _LONGEST)
        time.sleep(rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)]) if hit else 0)
    else:
        time.sleep(rng.uniform(0, 0.9 * seconds))
    stored = sealed(out)
    phase = _phase(out, before, size, aim)
    if process.poll() is not None:
        return None, stored
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return phase, stored


def _phase(out: Path, before: list[int], size: int, aim: str) -> str:
    """What the run was at, as far as its files tell."""
    log = out / "log.jsonl"
    if aim in ("a save", "a deletion", "the export", "the report"):
        return aim
    if not log.exists() or log.stat().st_size == size:
        return "restoring" if before else "start-up and compilation"
    return "steps"


def _ended(course: Course, out: Path) -> str | None:
    """Lets the run end; what differs from the undisturbed one."""
    process = course.start(out)
    try:
        code = process.wait(_LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"{out}: it did not end"
    if code != 0:
        return f"{out}: exit code {code}: {said(out)}"
    differs = differing(trace_of(out), course.trace)
    return f"{out}: differs in {', '.join(differs)}" if differs else None
