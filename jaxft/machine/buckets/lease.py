"""One run at a time works in a folder of a bucket: an object ``run.lock``, put only where there is none (If-None-Match), and renewed.

There is no kernel that would take it from a dead holder. So whoever finds one looks whether it is renewed; where it stands still for
:data:`STILL_SECONDS`, its holder is taken for dead. A process of this host that does not run any more is dead at once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from jaxft.errors import StorageError, UserError
from jaxft.machine.buckets.store import Store
from jaxft.machine.lock import is_running

NAME = "run.lock"
BEAT_SECONDS = 10.0
"""How often a holder puts the object anew."""
STILL_SECONDS = 60.0
"""How long it must stand still before its holder is taken for dead."""
SETTLE_SECONDS = 2.0
"""After taking over, how long to wait for someone else who does the same at this moment."""
_ATTEMPTS = 5


class Lease:
    """The object that says that this process has the folder."""

    def __init__(self, address: str) -> None:
        self._store, self._brief = Store(address), Store(address, BEAT_SECONDS)
        self._id, self._beat = uuid.uuid4().hex, 0
        self._since = time.strftime("%Y-%m-%d %H:%M:%S %z")

    def body(self) -> bytes:
        """The next content: each is another one."""
        self._beat += 1
        who = {"host": socket.gethostname(), "processes": _processes(), "pid": os.getpid()}
        said = {**who, "since": self._since, "id": self._id, "beat": self._beat}
        return (json.dumps(said) + "\n").encode()

    def check(self) -> None:
        """Raises UserError if another run has the folder now."""
        found = self._store.read(NAME)
        if found is None:
            self._store.put_new(NAME, self.body())
            found = self._store.read(NAME)
        if not self.is_mine(found):
            raise UserError(
                f"{self._store.address}: another run has taken this folder over ({_holder(found)}); this one ends and puts nothing "
                "there any more"
            )

    def is_mine(self, content: bytes | None) -> bool:
        """Whether this process has put it."""
        return _said(content).get("id") == self._id

    def renew(self) -> None:
        """Puts the object anew; one that is another's stays."""
        if self.is_mine(self._brief.read(NAME)):
            self._brief.put(NAME, self.body())

    def leave(self) -> None:
        """Deletes the object, if it is this process's; one that cannot be deleted now stands still, and is taken over."""
        with suppress(StorageError):
            if self.is_mine(self._brief.read(NAME)):
                self._brief.delete([NAME])


@contextmanager
def leased(address: str, note: Callable[[str], None]) -> Iterator[Lease]:
    """Has the folder for as long as the block lasts.

    Args:
      note: takes a line that says that the object of another process is being watched, or was taken over.

    Raises:
      UserError: another process has it.
      StorageError: the store did not answer for too long.
    """
    lease = Lease(address)
    _take(Store(address), lease, note)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease, ended), name="jaxft-lease", daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        ended.set()
        beating.join(BEAT_SECONDS)
        lease.leave()


def _take(store: Store, lease: Lease, note: Callable[[str], None]) -> None:
    for _ in range(_ATTEMPTS):
        # The answer to a put may be lost, and a second try be refused for the first one's object: what is there decides.
        if store.put_new(NAME, lease.body()) or lease.is_mine(store.read(NAME)):
            return
        before = store.read(NAME)
        if before is None:
            continue
        _refuse_if_alive(store, before, note)
        if store.read(NAME) == before:
            store.delete([NAME])
        if store.put_new(NAME, lease.body()):
            time.sleep(SETTLE_SECONDS)
        if lease.is_mine(store.read(NAME)):
            note(
                f"{store.address}/{NAME}: its holder ({_holder(before)}) ended without a word; this run goes on in its place"
            )
            return
    raise UserError(f"{store.address}/{NAME}: other processes take and leave it all the time")


def _refuse_if_alive(store: Store, before: bytes, note: Callable[[str], None]) -> None:
    said = _said(before)
    here = said.get("host") == socket.gethostname() and said.get("processes") == _processes()
    pid = said.get("pid")
    if here and isinstance(pid, int) and not is_running(pid):
        return
    note(
        f"{store.address}/{NAME}: held by {_holder(before)}; looking for {STILL_SECONDS:.0f} s whether that process is still there"
    )
    until = time.monotonic() + STILL_SECONDS
    while time.monotonic() < until:
        time.sleep(min(BEAT_SECONDS / 2, max(0.0, until - time.monotonic())))
        if store.read(NAME) not in (before, None):
            raise UserError(
                f"{store.address}: another run is at work here: {_holder(before)}; wait for it, end it, or give another folder"
            )


def _beat(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        try:
            lease.renew()
        except UserError:  # the store is away: what is to be stored tells it
            continue


def _processes() -> str:
    """What the processes are told apart by that this one can see: containers of one host name have their own numbers."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux: one set for all
        return ""


def _said(content: bytes | None) -> dict[str, object]:
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _holder(content: bytes | None) -> str:
    said = _said(content)
    return f"process {said.get('pid')} on {said.get('host')}, since {said.get('since')}"
