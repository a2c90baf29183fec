"""A small real file system that fills up, at as many points of a run as there are cases (needs root: a tmpfs is mounted).

The run must end with exit code 4 in one line, steps that were stored must be whole, and when there is room again the same command must
take it to the end of an undisturbed run.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from .course import Course, differing, said, sealed, state_of, trace_of
from .report import Report


def run(course: Course, count: int, seed: int) -> Report:
    """One case for each size of disk, from what holds nothing to what nearly holds the run."""
    del seed
    report = Report("disks")
    used = sum(path.stat().st_size for path in (course.folder / "whole").rglob("*") if path.is_file()) // 1024
    disk = course.folder / "disk"
    disk.mkdir()
    for number in range(count):
        size = max(8, (used + 600) * (number + 1) // (count + 1))
        _sized(disk, size, mounted=False)
        try:
            report.count("full", _filled(course, disk, f"{size} KiB"))
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return report


def _sized(disk: Path, kibibytes: int, *, mounted: bool) -> None:
    how = f"remount,size={kibibytes}k" if mounted else f"size={kibibytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(disk)], check=True)


def _filled(course: Course, disk: Path, what: str) -> str | None:
    out = disk / "run"
    # What is printed goes elsewhere: the disk is to be filled by the run alone.
    (disk / "run.said").symlink_to(course.folder / f"disk-{what.replace(' ', '')}.said")
    code = course.start(out).wait()
    lines = [line for line in (disk / "run.said").read_text().splitlines() if "error" in line or "Traceback" in line]
    if code not in (0, 4):
        return f"{what}: exit code {code}: {said(out)}"
    if code == 4 and (len(lines) != 1 or len(lines[0]) > 300):
        return f"{what}: {len(lines)} lines: {' | '.join(lines)[:600]}"
    for step in sealed(out):
        state_of(out, step)
    _sized(disk, 64 << 10, mounted=True)
    code = course.start(out).wait()
    if code != 0:
        return f"{what}: with room again, exit code {code}: {said(out)}"
    differs = differing(trace_of(out), course.trace)
    return f"{what}: differs in {', '.join(differs)}" if differs else None
