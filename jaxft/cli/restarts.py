"""``jaxft train --restarts N``: a parent process, without jax, that starts a run again where that may help."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from jaxft.errors import HUNG, PEER_LOST
from jaxft.machine import signals
from jaxft.machine.processes.bring_up import TRY

NAME = "restarts.jsonl"
_LAUNCHER = "JAXFT_LAUNCHER_PID"
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_JITTER = 0.25
"""By so much of itself a wait is longer or shorter, so that many runs do not come back at once."""
_LOOK = 0.5
_KINDS = {
    0: "done",
    2: "input",
    3: "checkpoints",
    4: "storage",
    5: "numerics",
    6: "plan",
    HUNG: "hang",
    PEER_LOST: "peer",
    130: "stopped",
}
_AGAIN = ("crash", "hang", "peer", "storage")
_TOLD = {-number for number in signals.STOPPING}


def kind_of(code: int) -> str:
    """What ended a program with this exit code, negative for a signal: ``crash``, ``hang``, ``peer``, ``storage`` and others."""
    return "stopped" if code in _TOLD else _KINDS.get(code, "crash")


def supervise(arguments: Sequence[str], folders: Sequence[Path], most: int, index: int, silence: float | None) -> int:
    """Runs ``jaxft train`` until it ends in a way that another start would not mend; its exit code.

    Args:
      arguments: of the command.
      folders: of its runs, one per seed, the first that of the command, where ``restarts.jsonl`` goes.
      most: how often it is started again.
      index: number of this process among those of the run.
      silence: seconds after which a process that is stopped is ended; its peers have given it up. None: it has none.
    """
    command = [*sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])], "train", *arguments]
    log = folders[0] / (NAME if index == 0 else f"restarts-{index}.jsonl")
    counts, waits, step = Counter[str](), 0, _steps(folders)
    with _told() as told:
        while True:
            code = told.run(command, {TRY: str(counts.total()), _LAUNCHER: str(os.getpid())}, silence)
            kind, stored = kind_of(code), _steps(folders)
            waits, step = (0 if stored != step else waits), stored
            if told.names or kind not in _AGAIN or counts.total() >= most:
                break
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**waits) * random.uniform(1 - _JITTER, 1 + _JITTER)
            counts[kind], waits = counts[kind] + 1, waits + 1
            newest = max(stored.values(), default=0)
            _say(
                f"{kind} ({_ending(code)}) after step {newest} was stored: start {counts.total()} of {most} again in {wait:.1f} s"
            )
            _record(log, {"code": code, "kind": kind, "step": newest, "wait": round(wait, 1)})
            told.wait(wait)
            if told.names:
                code = signals.STOPPED
                break
    if counts:
        parts = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        rest = (
            ""
            if kind not in _AGAIN or told.names
            else f"; given up: {kind} ({_ending(code)}), the same command goes on"
        )
        _say(f"started again {counts.total()} times: {parts}{rest}")
    return 128 - code if code < 0 and code not in _TOLD else signals.STOPPED if code < 0 else code


class _Told:
    """The child, and the signals that have come for it."""

    def __init__(self, launcher: int | None) -> None:
        self.names: list[str] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._launcher = launcher
        self._woken = threading.Event()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on."""
        self.names.append(signal.Signals(number).name)
        self._woken.set()
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(number)

    def run(self, command: Sequence[str], environ: Mapping[str, str], silence: float | None) -> int:
        """Starts a program and waits for its end; its exit code, negative for a signal."""
        self._child = subprocess.Popen(command, env={**os.environ, **environ})
        if self.names:  # told while it was being started
            self._child.send_signal(signal.SIGTERM)
        stopped = 0.0
        while True:
            try:
                return self._child.wait(_LOOK)
            except subprocess.TimeoutExpired:
                self.look()
            stopped = stopped + _LOOK if silence is not None and _is_stopped(self._child.pid) else 0.0
            if silence is not None and stopped > silence:
                self._child.kill()

    def wait(self, seconds: float) -> None:
        """Returns after a while, or once told."""
        deadline = time.monotonic() + seconds
        while not self._woken.is_set() and (left := deadline - time.monotonic()) > 0:
            self._woken.wait(min(left, _LOOK))
            self.look()

    def look(self) -> None:
        """Is told as by a signal once the launcher, of which this process is the child, is gone."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            self.handle(signal.SIGTERM, None)


@contextmanager
def _told() -> Iterator[_Told]:
    """Has this process's signals for its child."""
    launcher = os.environ.get(_LAUNCHER, "")
    told = _Told(int(launcher) if launcher.isdecimal() else None)
    with signals.handled(
        told.handle
    ):  # and not by the program's own watch, which would end this process before its child
        yield told


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped (SIGSTOP), as far as the system tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _steps(folders: Sequence[Path]) -> dict[Path, int]:
    """The newest stored step of each run."""
    from jaxft import checkpoint

    found = {folder: checkpoint.step_folders(folder / "checkpoints") for folder in folders}
    return {folder: max(steps) for folder, steps in found.items() if steps}


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"code {code}"


def _say(text: str) -> None:
    print(f"jaxft train: {text}", file=sys.stderr, flush=True)


def _record(path: Path, said: Mapping[str, object]) -> None:
    """Adds a line; a disk that does not take it ends no run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"when": time.strftime("%Y-%m-%d %H:%M:%S %z"), **said}) + "\n")
    except OSError as error:
        _say(f"{path} cannot be written: {error.strerror}")
