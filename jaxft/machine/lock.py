"""One process at a time works in a run's folder: a lock that the kernel releases however its holder ends.

The lock is a file, ``run.lock``, that is locked (``flock``) and says who holds it. On one machine the kernel's word is enough: once a
process is dead, ``kill -9`` included, its lock is gone. File systems that machines share differ: some take locks for all, some for each
machine by itself, some not at all. So a holder also renews the file's time, and another host's file is taken over only after that time
has been seen to stand still.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxft.errors import UserError

NAME = "run.lock"
BEAT_SECONDS = 5.0
"""How often a holder renews the file's time."""
STILL_SECONDS = 30.0
"""How long the file of another host must stand still before its holder is taken for dead."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_ATTEMPTS = 100


@dataclass(frozen=True)
class Holder:
    """Who holds a folder, as its file says."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def held(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder, which is made if need be, for as long as the block lasts.

    Args:
      note: takes a line that says that the lock of a dead process was taken over, or that another host's is being watched.

    Raises:
      UserError: another process holds it, or the folder cannot be written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, before = _take(path, note)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give another folder") from error
    if before is not None:
        note(f"{path}: its holder ({before}) ended without a word; this run goes on in its place")
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, descriptor, ended), name="jaxft-lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):  # someone has removed it by hand
            if _same(path, descriptor):
                path.unlink()  # while it is locked: whoever waits for it sees that it has gone
        os.close(descriptor)


def _take(path: Path, note: Callable[[str], None]) -> tuple[int, Holder | None]:
    """The locked file, which says that this process holds it, and the dead process that it said before."""
    for _ in range(_ATTEMPTS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _lock(path, descriptor)
            if not _same(path, descriptor):  # its last holder has removed it meanwhile
                os.close(descriptor)
                continue
            before = _holder(descriptor)
            if before is not None:
                _refuse_if_alive(path, before, locked, note)
            _state(descriptor)
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor, before
    raise UserError(f"{path}: other processes take and leave it all the time")


def _lock(path: Path, descriptor: int) -> bool:
    """Whether the kernel has given us the lock; False: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refused(path, _told(descriptor)) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _told(descriptor: int) -> Holder | None:
    """Who holds the file; a moment's patience for one that has it and has not said so yet."""
    for _ in range(20):
        if (found := _holder(descriptor)) is not None:
            return found
        time.sleep(0.05)
    return None


def _refuse_if_alive(path: Path, before: Holder, locked: bool, note: Callable[[str], None]) -> None:
    if before.host == socket.gethostname():
        # The kernel's word, if there is one: it would not have locked the file twice.
        if not locked and is_running(before.pid):
            raise _refused(path, before)
        return
    begun = os.stat(path).st_mtime_ns
    quiet = max(0.0, _age(path))
    if quiet < STILL_SECONDS:
        wait = STILL_SECONDS - quiet
        note(f"{path}: held by {before}; looking for {wait:.0f} s whether that process is still there")
        until = time.monotonic() + wait
        while time.monotonic() < until:
            time.sleep(min(1.0, BEAT_SECONDS))
            with open(path) as file:  # opened anew: a network file system looks again
                if os.fstat(file.fileno()).st_mtime_ns != begun:
                    raise _refused(path, before)


def _refused(path: Path, holder: Holder | None) -> UserError:
    who = "a process that has not said who it is" if holder is None else str(holder)
    text = f"{path.parent}: another run is at work here: {who}"
    ways = "wait for it, end it, or give another folder"
    if holder is not None and holder.host != socket.gethostname():
        with suppress(OSError):
            text += f", last sign of life {max(0.0, _age(path)):.0f} s ago"
        ways += f"; if that host is dead for good, remove {path}"
    return UserError(f"{text}; {ways}")


def _age(path: Path) -> float:
    """Seconds since the file's time, by the clock of its file system."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether another process of this host has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    return pid != os.getpid()


def _same(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> Holder | None:
    """Who the file says; None: nobody, or its holder has only begun to write."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(str(found["host"]), int(found["pid"]), str(found["since"]))
    except (ValueError, KeyError, TypeError):
        return None


def _state(descriptor: int) -> None:
    mine = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z"))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(asdict(mine)) + "\n").encode(), 0)
    os.fsync(descriptor)


def _beat(path: Path, descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # a disk that fails is told by what is stored there
            if not _same(path, descriptor):
                print(f"warning: {path} has been removed: another run may now begin here", file=sys.stderr, flush=True)
                return
            os.utime(descriptor)
