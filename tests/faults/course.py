"""A small real run that faults are put into: how it is started, and what it left when it was over, byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import socket
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


class Running:
    """The processes of a run that was started."""

    def __init__(self, options: tuple[str, ...], out: Path, count: int) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out = out
        address = f"127.0.0.1:{_free_port()}"
        with open(out.with_name(f"{out.name}.said"), "a") as said:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "jaxft", "train", *options, f"train.out={out}"],
                    env=environment() | _place(address, index, count), stdout=said, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, start_new_session=True, text=True,
                )
                for index in range(count)
            ]  # fmt: skip

    def ended(self) -> bool:
        """Whether any of them has ended."""
        return any(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float = 180.0) -> int | None:
        """The first exit code that is not 0, or 0; None: they did not end in time, and have been killed."""
        deadline = time.monotonic() + seconds
        try:
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            return None
        return next((code for code in codes if code), 0)

    def kill(self, only: int | None = None) -> None:
        """kill -9 of all, or of one; waits until they are gone."""
        chosen = self.processes if only is None else [self.processes[only]]
        for process in chosen:
            process.kill()
        for process in chosen:
            process.wait()


@dataclass(frozen=True)
class Course:
    """The run, and what an undisturbed one left."""

    folder: Path
    options: tuple[str, ...]
    trace: dict[str, str]
    seconds: float
    """What the undisturbed one took from start to end, with compiled programs at hand."""
    processes: int = 1

    def places(self) -> list[dict[str, str]]:
        """What each process of a new start is told of its place, as variables."""
        return places(self.processes)

    def start(self, out: Path) -> Running:
        """Begins or goes on with the run in ``out``; what it says is added to ``OUT.said``."""
        return Running(self.options, out, self.processes)


def environment() -> dict[str, str]:
    """One CPU device, and quick compilation."""
    return os.environ | {
        "XLA_FLAGS": quick_flags(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(TESTS.parent),
        "COLUMNS": "100",
    }


def places(count: int) -> list[dict[str, str]]:
    """What each of some processes that are started now is told of its place, as variables."""
    address = f"127.0.0.1:{_free_port()}"
    return [_place(address, index, count) for index in range(count)]


def _place(address: str, index: int, count: int) -> dict[str, str]:
    if count == 1:
        return {}
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def prepare(folder: Path, processes: int = 1) -> Course:
    """Makes the data, compiles what is to be compiled, and takes the run to its end twice undisturbed."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = ("train.compilation_cache", "train.steps", "train.log_every", "eval.every", "optim.ema")
    given = [option for option in overrides(folder) if not option.startswith(ours)]
    mesh = [f"mesh.data={processes}"] if processes > 1 else []
    options = (*given, *mesh, f"train.compilation_cache={folder / 'programs'}", *_OPTIONS)
    seconds = 0.0
    for name in ("first", "whole"):
        began = time.monotonic()
        if Running(options, folder / name, processes).wait() != 0:
            raise RuntimeError((folder / f"{name}.said").read_text())
        seconds = time.monotonic() - began
    first, whole = trace_of(folder / "first"), trace_of(folder / "whole")
    if first != whole:
        raise RuntimeError(f"two undisturbed runs differ in {differing(first, whole)}")
    return Course(folder, options, whole, seconds, processes)


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


def wait_until(what: Callable[[], bool], running: Running, seconds: float = 180.0) -> bool:
    """Whether something came true before the run or the time was over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not running.ended():
        if what():
            return True
        time.sleep(0.001)
    return False


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
