"""Puts real faults into real runs and counts what came out wrong: ``make faults``.

python tests/faults/run.py                      # all batteries, as many cases as the table in docs/faults.md says
python tests/faults/run.py --quick              # some of each, a few minutes
python tests/faults/run.py --only kills --count 20 --seed 7 --json found.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # started as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "faults"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # of this process alone: runs have one device each

from faults import buckets, corruptions, counts, disks, kills, meshes, run_malformed, signals, soak
from faults.course import Course, prepare
from faults.report import Report


def _malformed(course: Course, count: int, seed: int) -> Report:
    found = run_malformed.run(count, seed)
    report = Report("malformed")
    report.cases.update(found["by_kind"])
    report.wrong = [f"{one['case']}: {'; '.join(one['problems'])}" for one in found["wrong_ones"]]
    return report


_Battery = Callable[[Course, int, int], Report]
_BATTERIES: dict[str, tuple[_Battery, int, int, int]] = {
    "kills": (kills.run, 1, 200, 10),
    "corruptions": (corruptions.run, 1, 500, 60),
    "signals": (signals.run, 1, 40, 4),
    "disks": (disks.run, 1, 20, 3),
    "meshes": (meshes.run, 1, 36, 12),
    "counts": (counts.run, 1, 18, 4),
    "soak": (soak.run, 1, 500, 3),
    "malformed": (_malformed, 1, 2000, 40),
    "buckets": (buckets.run, 1, 100, 10),
    "hosts": (buckets.run, 2, 100, 5),
    "pair-kills": (kills.run, 2, 100, 2),
    "pair-signals": (signals.run, 2, 10, 1),
}
"""By name: what runs it, on how many processes, and how many cases it has in full and with --quick."""


def main(arguments: list[str] | None = None) -> int:
    """0 if nothing came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(_BATTERIES), default=list(_BATTERIES))
    parser.add_argument("--count", type=int, help="cases of each battery")
    parser.add_argument("--quick", action="store_true", help="some cases of each battery")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="jaxft-faults-"))
    reports: list[Report] = []
    courses: dict[int, Course] = {}
    try:
        for name in options.only:
            battery, processes, full, quick = _BATTERIES[name]
            if processes not in courses:
                courses[processes] = prepare(folder / str(processes), processes)
            began = time.monotonic()
            count = options.count or (quick if options.quick else full)
            reports.append(battery(courses[processes], count, options.seed))
            reports[-1].figures["seconds"] = round(time.monotonic() - began, 1)
            _say(reports[-1])
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps({one.name: one.as_json() for one in reports}, indent=2) + "\n")
    return 1 if any(one.wrong for one in reports) else 0


def _say(report: Report) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.cases.items()))
    print(f"{report.name}: {report.cases.total()} cases ({kinds}), {len(report.wrong)} wrong, {report.figures}")
    for line in report.wrong:
        print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
