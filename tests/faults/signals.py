"""SIGTERM, SIGINT and SIGHUP at random moments of runs of one and of two processes: no more than one step is taken again.

A stopped run must have ended with 130 and stored the last step that its log has, or the one before; and what it leaves when the same
command has taken it to its end must be what an undisturbed run leaves.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from .course import TESTS, Course, differing, said, sealed, trace_of, wait_until
from .report import Report

_LONGEST = 180.0
_LAUNCHER = (str(TESTS.parent / "launch" / "local.sh"), "2")


def run(course: Course, count: int, seed: int) -> Report:
    """Signals runs so many times in all; every fifth has two processes."""
    report, rng = Report("signals"), random.Random(seed)
    empty = course.folder / "empty.yaml"
    empty.write_text("{}\n")
    pair = _undisturbed_pair(course, empty) if count >= 5 else {}
    for number in range(count):
        processes = 2 if number % 5 == 4 else 1
        number_of = rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        out = course.folder / f"signalled-{number}"
        problem = _signalled(course, out, number_of, rng, empty if processes == 2 else None, pair)
        report.count(f"{number_of.name} of {processes} process{'es' if processes > 1 else ''}", problem)
    return report


def _start(course: Course, out: Path, empty: Path | None) -> subprocess.Popen[str]:
    if empty is None:
        return course.start(out)
    return course.start(out, "mesh.data=2", launcher=(*_LAUNCHER, str(empty)))


def _undisturbed_pair(course: Course, empty: Path) -> dict[str, str]:
    out = course.folder / "whole-pair"
    if _start(course, out, empty).wait(_LONGEST) != 0:
        raise RuntimeError(said(out, 20))
    return trace_of(out)


def _signalled(
    course: Course, out: Path, number: signal.Signals, rng: random.Random, empty: Path | None, pair: dict[str, str]
) -> str | None:
    process = _start(course, out, empty)
    log = out / "log.jsonl"
    # Within the steps, where there is something to lose; elsewhere a signal ends the run in a line, which tests look at.
    if not wait_until(lambda: log.exists() and log.stat().st_size > 0, process, _LONGEST):
        return f"{out}: no step was taken: {said(out)}"
    time.sleep(rng.uniform(0, 0.25 * course.seconds))
    if process.poll() is None:
        process.send_signal(number)
    try:
        code = process.wait(_LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"{out}: it did not stop"
    if code not in (0, 130):
        return f"{out}: exit code {code}: {said(out)}"
    steps = [record["step"] for record in map(json.loads, log.read_text().splitlines()) if "loss" in record]
    if code == 130 and steps and (not sealed(out) or sealed(out)[-1] < steps[-1] - 1):
        return f"{out}: stopped after step {steps[-1]}, but {sealed(out)} are stored"
    if code == 130:
        code = _start(course, out, empty).wait(_LONGEST)
        if code != 0:
            return f"{out}: going on ended with {code}: {said(out)}"
    differs = differing(trace_of(out), pair if empty is not None else course.trace)
    return f"{out}: differs in {', '.join(differs)}" if differs else None
