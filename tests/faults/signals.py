"""SIGTERM, SIGINT and SIGHUP at random moments of the steps of a run: no more than one step is taken again.

A stopped run must have ended with 130 and stored the last step that its log has, or the one before; and what it leaves when the same
command has taken it to its end must be what an undisturbed run leaves.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

from .course import Course, differing, said, sealed, trace_of, wait_until
from .report import Report


def run(course: Course, count: int, seed: int) -> Report:
    """Signals runs so many times in all; of several processes, one of them."""
    report = Report("signals" if course.processes == 1 else f"signals to {course.processes} processes")
    rng = random.Random(seed)
    for number in range(count):
        kind = rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        report.count(kind.name, _signalled(course, course.folder / f"signalled-{number}", kind, rng))
    return report


def _signalled(course: Course, out: Path, kind: signal.Signals, rng: random.Random) -> str | None:
    running, log = course.start(out), out / "log.jsonl"
    # Within the steps, where there is something to lose; elsewhere a signal ends the run in a line, which tests look at.
    if not wait_until(lambda: log.exists() and log.stat().st_size > 0, running):
        return f"{out}: no step was taken: {said(out)}"
    time.sleep(rng.uniform(0, 0.25 * course.seconds))
    if not running.ended():
        rng.choice(running.processes).send_signal(kind)
    code = running.wait()
    if code not in (0, 130):
        return f"{out}: exit code {code}: {said(out)}"
    steps = [record["step"] for record in map(json.loads, log.read_text().splitlines()) if "loss" in record]
    if code == 130 and steps and (not sealed(out) or sealed(out)[-1] < steps[-1] - 1):
        return f"{out}: stopped after step {steps[-1]}, but {sealed(out)} are stored"
    if code == 130:
        code = course.start(out).wait()
        if code != 0:
            return f"{out}: going on ended with {code}: {said(out)}"
    differs = differing(trace_of(out), course.trace)
    return f"{out}: differs in {', '.join(differs)}" if differs else None
