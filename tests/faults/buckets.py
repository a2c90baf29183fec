"""A run whose folder is in a bucket, with requests that fail: throttled, server errors, connections cut before, in or after an answer.

The store is moto's S3 server on this machine behind a proxy (object_stores.py). A run is stopped by a signal or killed, goes on from
another machine (an empty cache), and is left to end on the last; of several processes each has a cache of its own, as on several
hosts. No step that was in the bucket may be lost, and what is there at the
end must be what an undisturbed run leaves.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxft.errors import PEER_LOST

from .course import Course, differing, environment, said, trace_of
from .object_stores import Faults, environment_of, faulty, s3_server
from .report import Report

_BUCKET = "runs"
_SHARE = 0.06
"""Of all requests."""
_ROUNDS = 3
"""Machines that a run is worked on, one after the other."""


def run(course: Course, count: int, seed: int) -> Report:
    """Runs until so many requests have failed."""
    report = Report("buckets" if course.processes == 1 else f"buckets of {course.processes} hosts")
    requests = runs = 0
    with s3_server() as upstream:
        while report.cases.total() < count:
            faults = Faults(_SHARE, rng=random.Random(f"{seed} {runs}"))
            before = report.cases.total()
            with faulty(upstream, faults) as endpoint:
                problem = _one(course, f"run-{runs}", endpoint, faults, random.Random(f"{seed} {runs} ends"))
            for kind, number in faults.counts.items():
                report.cases[kind] += number
            if problem is not None:
                report.wrong.append(f"{report.name}: {problem}")
            runs, requests = runs + 1, requests + faults.requests
            if report.cases.total() == before:
                report.wrong.append(f"{report.name}: no request of {faults.requests} failed")
                break
    report.figures |= {"runs": runs, "requests": requests}
    return report


def _one(course: Course, name: str, endpoint: str, faults: Faults, rng: random.Random) -> str | None:
    environ = environment() | environment_of(endpoint)
    address = f"s3://{_BUCKET}/{name}"
    share, faults.share = faults.share, 0.0
    _make_bucket(environ)
    faults.share = share
    for number in range(_ROUNDS):
        cache = course.folder / f"{name}-cache-{number}"
        steps = _steps(environ, address, faults)
        out = course.folder / f"{name}-{number}"
        code = _worked(
            course, out, address, environ | {"JAXFT_CACHE": str(cache)}, faults, rng, last=number == _ROUNDS - 1
        )
        after = _steps(environ, address, faults)
        if steps and (not after or after[-1] < steps[-1]):
            return f"{address}: step {steps[-1]} is lost, there are {after}: {said(out)}"
        if code not in (0, 130, PEER_LOST, -signal.SIGKILL) or (number == _ROUNDS - 1 and code != 0):
            return f"{address}: exit code {code}: {said(out)}"
        for one in cache.parent.glob(f"{cache.name}*"):
            shutil.rmtree(one / "objects", ignore_errors=True)
    got = course.folder / f"{name}-got"
    faults.share = 0.0
    _download(environ, address, got)
    differs = differing(trace_of(got), course.trace)
    # The lock lies in the bucket only while a run is at work there.
    return f"{address}: differs in {', '.join(differs)}" if differs else None


def _worked(
    course: Course, out: Path, address: str, environ: dict[str, str], faults: Faults, rng: random.Random, *, last: bool
) -> int:
    """Starts the run on other machines, and ends it at some time but for the last; the first exit code that is not 0, or 0."""
    with open(out.with_name(f"{out.name}.said"), "a") as told:
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "jaxft", "train", *course.options, f"train.out={address}"],
                env=environ | {"JAXFT_CACHE": f"{environ['JAXFT_CACHE']}-{index}"} | place,
                stdout=told, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )
            for index, place in enumerate(course.places())
        ]  # fmt: skip
    if not last:
        deadline = time.monotonic() + 240
        begun, wanted = faults.puts.total(), rng.randrange(60, 400)
        while not _any_ended(running) and time.monotonic() < deadline and faults.puts.total() < begun + wanted:
            time.sleep(0.01)
        number = rng.choice([signal.SIGTERM, signal.SIGKILL])
        told_one = rng.random() < 0.5
        for one in running[:1] if told_one else running:  # one that goes takes the others with it
            one.send_signal(number)
    try:
        codes = [one.wait(400) for one in running]
    except subprocess.TimeoutExpired:
        for one in running:
            one.kill()
        codes = [one.wait() for one in running]
    return next((code for code in codes if code), 0)


def _any_ended(running: list[subprocess.Popen[bytes]]) -> bool:
    return any(one.poll() is not None for one in running)


_SCRIPT = """
import sys, s3fs
files, what = s3fs.S3FileSystem(), sys.argv[1]
if what == "make" and not files.exists(sys.argv[2]): files.mkdir(sys.argv[2])
if what == "list": print("\\n".join(files.find(sys.argv[2])))
if what == "get": files.get(sys.argv[2] + "/", sys.argv[3] + "/", recursive=True)
"""


def _make_bucket(environ: dict[str, str]) -> None:
    _scripted(environ, "make", _BUCKET)


def _steps(environ: dict[str, str], address: str, faults: Faults) -> list[int]:
    """The steps that have their seal, seen without faults."""
    share, faults.share = faults.share, 0.0
    found = _scripted(environ, "list", address.removeprefix("s3://")).splitlines()
    faults.share = share
    return sorted(int(name.split("/")[-2]) for name in found if name.endswith("/jaxft.json"))


def _download(environ: dict[str, str], address: str, folder: Path) -> None:
    _scripted(environ, "get", address.removeprefix("s3://"), str(folder))


def _scripted(environ: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        env=os.environ | environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout
