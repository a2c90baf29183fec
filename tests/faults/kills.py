"""kill -9 at random moments of a run: start-up, compilation, steps, saves, deletions, restoring, report and export.

A run is killed several times and then left to end. No step that was stored and named may be lost, and what the run leaves must be
what an undisturbed one leaves, bit for bit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .course import Course, Running, differing, said, sealed, trace_of, wait_until
from .report import Report

_EACH = 5  # kills of one run, before it is left to end
_ALONE_SECONDS = 30.0  # that a process may go on without one that was killed


def run(course: Course, count: int, seed: int) -> Report:
    """Kills runs so many times in all; those of several processes while they save, one process or all."""
    report = Report("kills" if course.processes == 1 else f"kills of {course.processes} processes")
    workers = 2 if course.processes == 1 else 1
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
        killed = _kill(course.start(out), course, before, rng)
        if killed.phase is None:
            problem = killed.problem
            break  # it had ended before
        after, newest = sealed(out), killed.stored[-1:]
        lost = bool(newest) and after[-1:] < newest
        found.append((killed.phase, f"{out}: step {newest[0]} is lost, there are {after}" if lost else killed.problem))
    else:
        problem = _ended(course, out)
    found = [(kind, wrong or problem) for kind, wrong in found]
    left = kills - len(found)
    return found + (_killed(course, out.with_name(f"{out.name}'"), left, rng) if left else [])


class _Killed(NamedTuple):
    """A kill."""

    phase: str | None
    """What the run was at; None: it had ended."""
    stored: list[int]
    """Steps that were stored just before."""
    problem: str | None = None


def _kill(running: Running, course: Course, before: list[int], rng: random.Random) -> _Killed:
    """Kills at a moment of any kind; of several processes one or all."""
    out = running.out
    log, began = out / "log.jsonl", time.time()
    size = log.stat().st_size if log.exists() else 0
    there = _under_way(out)  # by a run that was killed before

    def begun(kind: str) -> bool:
        return any(name.startswith(kind) for name in _under_way(out) - there)

    moments: dict[str, Callable[[], bool]] = {
        "saving": lambda: begun(".saving-"),
        "deleting": lambda: begun(".deleting-"),
        "stepping": lambda: log.exists() and log.stat().st_size != size,
        "reporting": lambda: (out / "metrics.json").exists() and (out / "metrics.json").stat().st_mtime > began,
        "exporting": lambda: begun(".export."),
    }
    aim = rng.choice(["", "", *moments]) if course.processes == 1 else "saving"
    if aim:
        hit = wait_until(moments[aim], running)
        time.sleep(rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)]) if hit else 0)
    else:
        time.sleep(rng.uniform(0, 0.9 * course.seconds))
    stored = sealed(out)
    if running.ended():
        code = running.wait()
        return _Killed(None, stored, None if code == 0 else f"{out}: exit code {code}: {said(out)}")
    phase, problem = aim or _phase(log, size, before), None
    if course.processes > 1 and rng.random() < 0.5:
        phase = f"{phase}, one process"
        running.kill(rng.randrange(course.processes))
        if running.wait(_ALONE_SECONDS) is None:
            problem = f"{out}: the others were still there after {_ALONE_SECONDS:.0f} s"
    running.kill()
    return _Killed(phase, stored, problem)


def _under_way(out: Path) -> set[str]:
    """Names of what is being written or deleted."""
    return {path.name for folder in (out, out / "checkpoints") if folder.is_dir() for path in folder.glob(".*")}


def _phase(log: Path, size: int, before: list[int]) -> str:
    """What the run was at, as far as its files tell."""
    if not log.exists() or log.stat().st_size == size:
        return "starting, restoring" if before else "starting, compiling"
    return "stepping"


def _ended(course: Course, out: Path) -> str | None:
    """Lets the run end; what differs from the undisturbed one."""
    code = course.start(out).wait()
    if code != 0:
        return f"{out}: exit code {code}: {said(out)}"
    differs = differing(trace_of(out), course.trace)
    return f"{out}: differs in {', '.join(differs)}" if differs else None
