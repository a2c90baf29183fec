"""Contenders of a benchmark: each in a process of its own that works when asked and sleeps meanwhile.

Taking turns, a change of the machine's speed hits all alike; apart, no one's memory or threads are another's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxft.errors import UserError
from jaxft.files import JsonObject
from jaxft.machine.memory import release_freed


class Worker:
    """A process that answers each line with a line of JSON."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        ours = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, **(environment or {})}
        # As `make train` does, for all contenders alike: see docs/performance.md.
        ours.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        self._errors = os.memfd_create(name) if hasattr(os, "memfd_create") else subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=ours
        )

    def read(self, seconds: float | None = None) -> JsonObject:
        """The next answer.

        Args:
          seconds: after which the process is ended; None: it is waited for.

        Raises:
          UserError: the process has died; the message ends with what it said last. Or it has not answered in time.
        """
        assert self._process.stdout is not None
        if seconds is not None and not select.select([self._process.stdout], [], [], max(0.0, seconds))[0]:
            self._process.kill()
            self._process.wait()
            raise UserError(f"{self.name}: no answer in time: {self._last_words()}")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise UserError(f"{self.name}: the worker died (exit {code}): {self._last_words()}")
        return json.loads(line)

    def ask(self, line: str = "") -> JsonObject:
        """Sends a line, returns the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # read() says what happened
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Ends the process, whether or not it still runs."""
        if self._process.poll() is None:
            self._process.communicate("")
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # a line that a dead process has not read
                stream.close()
        if self._errors > 0:
            os.close(self._errors)
            self._errors = -1

    def _last_words(self) -> str:
        if self._errors < 0:
            return "no message"
        text = os.pread(self._errors, 1 << 16, max(0, os.fstat(self._errors).st_size - (1 << 16)))
        lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
        return " ".join(lines[-1].split())[:300] if lines else "killed, perhaps for want of memory"


def answer(message: Mapping[str, object]) -> None:
    """Writes one line to the process that started this worker."""
    print(json.dumps(message), flush=True)


class PeakMemory:
    """How much this process holds at most from now on, beyond what it holds now. Linux; elsewhere None."""

    def __init__(self) -> None:
        release_freed()
        self._base: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._base = _status("VmRSS")
        except OSError:
            self._base = None

    def bytes(self) -> int | None:
        """So far."""
        return None if self._base is None else _status("VmHWM") - self._base


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def available_memory() -> int | None:
    """Bytes that new processes can have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def keep_freed_memory() -> None:
    """Makes the C library of a worker keep large freed blocks instead of returning them (glibc): repeated calls then do not
    pay for fresh pages, which a program that holds its buffers would not."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)
