"""A run under ``--restarts`` that is killed each time it has stored a step: what is left over, and what the parent comes to take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .course import Course, differing, environment, said, sealed, trace_of
from .report import Report

_EACH = 15  # restarts of one run, which stores some 20 steps
_GROWTH = 4 << 20
"""Bytes that the parent may take more at the end than after its first restarts."""
_WARM = 3
_SECONDS = 120.0


def run(course: Course, count: int, seed: int) -> Report:
    """So many restarts in all."""
    report = Report("soak")
    growth = 0
    for number in range(-(-count // _EACH)):
        kills = min(_EACH, count - number * _EACH)
        problem, grown = _soaked(course, course.folder / f"soaked-{number}", kills)
        report.cases["restart"] += kills - 1
        report.count("restart", problem)
        growth = max(growth, grown)
    report.figures["growth of the parent in KiB"] = growth // 1024
    return report


def _soaked(course: Course, out: Path, kills: int) -> tuple[str | None, int]:
    """What was wrong with a run that was killed so often, and by how many bytes its parent grew."""
    with open(out.with_name(f"{out.name}.said"), "a") as told:
        parent = subprocess.Popen(
            [sys.executable, "-m", "jaxft", "train", "--restarts", str(kills + 1), *course.options, f"train.out={out}"],
            env=environment(), stdout=told, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    taken: list[tuple[int, int]] = []
    for _ in range(kills):
        if not _killed(parent, out):
            break
        taken.append((_resident(parent.pid), len(os.listdir(f"/proc/{parent.pid}/fd"))))
    try:
        code = parent.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(parent.pid, signal.SIGKILL)
        return f"{out}: has not ended: {said(out)}", 0
    if code != 0 or len(taken) < kills:
        return f"{out}: exit code {code} after {len(taken)} of {kills} kills: {said(out)}", 0
    (out / "restarts.jsonl").unlink()
    differs = differing(trace_of(out), course.trace)
    first, last = taken[min(_WARM, kills) - 1], taken[-1]
    grown = max(0, last[0] - first[0])
    if differs:
        return f"{out}: differs in {', '.join(differs)}", grown
    if grown > _GROWTH or last[1] > first[1]:
        return f"{out}: the parent grew by {grown} bytes, and from {first[1]} to {last[1]} open files", grown
    return None, grown


def _killed(parent: subprocess.Popen[bytes], out: Path) -> bool:
    """Kills the run once it has stored another step; False: it has ended, or does not come to it."""
    before, deadline = sealed(out)[-1:], time.monotonic() + _SECONDS
    while time.monotonic() < deadline and parent.poll() is None:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        if children and sealed(out)[-1:] > before:
            os.kill(int(children[0]), signal.SIGKILL)
            while str(children[0]) in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split():
                time.sleep(0.01)
            return True
        time.sleep(0.005)
    return False


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
