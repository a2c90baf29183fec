"""A small real run that faults are put into: how it is started, and what it left when it was over, byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
if str(TESTS) not in sys.path:  # run.py is started as a script, pytest puts it there itself
    sys.path.insert(0, str(TESTS))

from quick_xla import quick_flags  # noqa: E402
from tiny_run import overrides  # noqa: E402

STEPS = 60
_OPTIONS = (f"train.steps={STEPS}", "train.log_every=1", "eval.every=3", "checkpoint.keep=2", "optim.ema=0.9")


@dataclass(frozen=True)
class Course:
    """The run, and what an undisturbed one left."""

    folder: Path
    options: tuple[str, ...]
    trace: dict[str, str]
    seconds: float
    """What the undisturbed one took from start to end, with compiled programs at hand."""

    def start(self, out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Begins or goes on with the run in ``out``, in a session of its own."""
        return start(self.options, out, *more, launcher=launcher)


def environment() -> dict[str, str]:
    """One CPU device, quick compilation, and signals' defaults whatever started the harness."""
    return os.environ | {
        "XLA_FLAGS": quick_flags(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(TESTS.parent),
        "COLUMNS": "100",
    }


def start(options: tuple[str, ...], out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Starts ``jaxft train`` with these options; standard output and error go to ``OUT.said``."""
    command = [*launcher] if launcher else [sys.executable, "-m", "jaxft", "train"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f"{out.name}.said"), "a") as said:
        return subprocess.Popen(
            [*command, *options, *more, f"train.out={out}"],
            env=environment(), stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip


def prepare(folder: Path, *more: str) -> Course:
    """Makes the data, compiles what is to be compiled, and takes the run to its end once undisturbed."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = f"train.compilation_cache={folder / 'programs'}"
    given = [
        option
        for option in overrides(folder)
        if not option.startswith(("train.compilation_cache", "train.steps", "eval.every"))
    ]
    options = (*(one for one in given if not one.startswith(("train.log_every", "optim.ema"))), cache, *_OPTIONS, *more)
    for name in ("first", "whole"):
        began = time.monotonic()
        process = start(options, folder / name)
        if process.wait() != 0:
            raise RuntimeError((folder / f"{name}.said").read_text())
        seconds = time.monotonic() - began
    first, whole = trace_of(folder / "first"), trace_of(folder / "whole")
    if first != whole:
        raise RuntimeError(f"two undisturbed runs differ in {differing(first, whole)}")
    return Course(folder, options, whole, seconds)


# ------------------------------------------------------------------------------------------------------ what a run left


def sealed(out: Path) -> list[int]:
    """The steps that are stored and complete, by their names."""
    folder = out / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit() and (path / "jaxft.json").is_file())


def trace_of(out: Path) -> dict[str, str]:
    """Hashes of all that must not depend on how often a run was interrupted: every array of the newest step, the place in the data,
    which steps are stored, the log, the scores, the export; and the names of all files at the top, so that nothing is left over."""
    newest = sealed(out)[-1]
    manifest = json.loads((out / "checkpoints" / str(newest) / "jaxft.json").read_text())
    found = {f"state/{path}": _hash(array.tobytes()) for path, array in state_of(out, newest).items()}
    meta = manifest["meta"]
    found["progress"] = _hash(json.dumps(meta.get("progress"), sort_keys=True).encode())
    for name in ("log.jsonl", "metrics.json", *(f"export/{path.name}" for path in sorted((out / "export").iterdir()))):
        if not name.endswith("README.md"):  # it says how long the training took
            found[name] = _hash((out / name).read_bytes())
    found["names"] = " ".join(sorted(path.name for path in out.iterdir()))
    found["steps"] = " ".join(sorted(path.name for path in (out / "checkpoints").iterdir()))
    return found


def state_of(out: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a stored step, by its path."""
    from jaxft.checkpoint import Checkpoints
    from jaxft.trees import nested, paths_of

    manifest = json.loads((out / "checkpoints" / str(step) / "jaxft.json").read_text())
    like = {path: np.zeros(leaf["shape"], leaf["dtype"]) for path, leaf in manifest["tree"].items()}
    with Checkpoints(out / "checkpoints", keep=99) as store:
        return {path: np.asarray(leaf) for path, leaf in paths_of(store.restore(nested(like), step).state).items()}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names under which two traces differ."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def said(out: Path, lines: int = 3) -> str:
    """The last lines that the processes of a run wrote."""
    return " | ".join(out.with_name(f"{out.name}.said").read_text(errors="replace").splitlines()[-lines:])


def wait_until(what: Callable[[], bool], process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether something came true before the process or the time was over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if what():
            return True
        time.sleep(0.001)
    return False


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
