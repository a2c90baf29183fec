"""Processes of a run that watch over each other: whoever dies, stops or hangs is named by all others, which end.

Without it a collective waits for ever for a process that is gone, or ends in an error that names nobody. Each process
has a connection to process 0, and both ends say every two seconds that they are there: a connection that closes without a word is a
death, silence a process that was stopped or a host that was lost. Process 0 tells all what it finds. Who leaves in order says so before.
No jax here.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypedDict

from jaxft.errors import HUNG, PEER_LOST, UserError
from jaxft.machine.processes.roll_call import Told
from jaxft.machine.signals import STOPPED

_BEAT = 2.0
_LOOK = 0.5
_GRACE = 5.0
"""Seconds that others have to end in order, once one has ended with an error: they may have found the same one."""
_VERDICT = 3.0
"""Seconds in which whoever has failed may still hear that another process is gone, which would be why."""
_FLUSH = 2.0
_REACH = 10.0
_LONGEST = 64 * 1024
_IN_ORDER = (0, STOPPED)
"""Codes after which a process is missed by nobody, if it has said them."""
_SHARED = (2, 3, 4, 5)
"""Codes of one process that are the run's: starting it again would not mend it in any process."""
_TAIL = "this process ends too; what was stored before is whole, the same command goes on"
Ended = Callable[[str, int], None]


class _Message(TypedDict, total=False):
    """What is sent: a beat (``step``), a farewell (``left``), or of process 0 who is lost (``lost``)."""

    step: int
    last: tuple[int, int, int] | None
    left: int
    now: bool
    lost: int
    how: str
    code: int


@dataclass(frozen=True)
class Offer:
    """Where process 0 takes the connections of the others."""

    listener: socket.socket
    key: str

    def said(self) -> Told:
        """What the others are told of it."""
        return {"port": self.listener.getsockname()[1], "key": self.key}


def offered() -> Offer:
    """Listens on any free port; for process 0."""
    return Offer(socket.create_server(("", 0), backlog=1024), secrets.token_hex(8))


@dataclass
class _Line:
    """What is known of a process at the other end."""

    connection: socket.socket | None = None
    unread: bytes = b""
    idle: float = 0.0
    step: int = 0
    left: int | None = None
    """The code that it said it ends with."""
    deadline: float | None = None
    """When others end, too, because it has."""


class Peers:
    """This process among the others.

    Args:
      index: its number.
      hosts: of all.
      silence: seconds without a word after which a process counts as lost.
      ended: called in a thread, once, with a line and an exit code, when another process is lost.
    """

    def __init__(self, index: int, hosts: Mapping[int, str], silence: float, ended: Ended) -> None:
        self._index, self._hosts, self._silence, self._ended = index, hosts, silence, ended
        others = [other for other in hosts if other != index] if index == 0 else [0]
        self._lines = {other: _Line() for other in others}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()  # of what is sent
        self._over, self._done = threading.Event(), threading.Event()
        self._offer: Offer | None = None
        self._own: int | None = None
        self._last: tuple[int, int, int] | None = None
        self._thread = threading.Thread(target=self._watch, name="jaxft-peers", daemon=True)
        self.step = 0
        """The step that this process has begun."""

    def listen(self, offer: Offer) -> None:
        """Begins, in process 0."""
        self._offer = offer
        self._selector.register(offer.listener, selectors.EVENT_READ, None)
        self._begin()

    def reach(self, host: str, said: Told) -> None:
        """Begins, in another process.

        Raises:
          UserError: process 0 cannot be reached.
        """
        deadline, port = time.monotonic() + _REACH, int(said["port"])
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=_REACH)
                connection.sendall(json.dumps({"index": self._index, "key": said["key"]}).encode() + b"\n")
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self._named(0)} cannot be reached on port {port}, by which processes watch over each other: "
                        f"{error.strerror or error}; open it, or set JAXFT_PEER_TIMEOUT=0 to do without"
                    ) from error
                time.sleep(0.2)
        self._take(0, connection)
        self._begin()

    def leave(self, code: int, *, at_once: bool) -> None:
        """Says that this process ends, and with which code.

        Args:
          at_once: it does not come to the end of Python's shutdown, where all wait for each other.
        """
        if self._own is None and code == 1 and not at_once:
            self._over.wait(_VERDICT)
        if threading.current_thread() is self._thread:
            return
        if self._over.is_set():
            self._done.wait()  # the thread that watches is about to end this process, if it is a program
        else:
            self._own = code
            self._tell({"left": code, "now": at_once})

    def behind(self) -> str | None:
        """Who has begun fewer steps than others, in words, if that is another process than this one."""
        last = self._slowest() if self._index == 0 else self._last
        if last is None or last[0] == self._index or last[1] == last[2]:
            return None
        return f"{self._named(last[0])} has begun {last[1]} steps, others {last[2]}"

    def close(self) -> None:
        """Stops watching, without a word."""
        self._over.set()
        self._thread.join()

    def _begin(self) -> None:
        self._thread.start()

    def _watch(self) -> None:
        last = beaten = time.monotonic()
        self._tell(self._beat())
        while not self._over.is_set():
            for key, _ in self._selector.select(_LOOK):
                self._heard(key.data)
            now = time.monotonic()
            if now - beaten >= _BEAT:
                beaten = now
                self._tell(self._beat())
            # Of a process that was itself stopped, or whose other threads gave it no turn, the time does not count.
            passed, last = min(now - last, 2 * _LOOK), now
            for index, line in self._lines.items():
                line.idle += passed
                if line.left is None and line.idle > self._silence:
                    self._lost(
                        index, f"has been silent for {line.idle:.0f} s (stopped, or its host is lost)", PEER_LOST
                    )
                elif line.deadline is not None and now > line.deadline:
                    self._lost(index, *_end_of(line.left or 0, at_once=False))
        self._selector.close()
        for line in self._lines.values():
            if line.connection is not None:
                line.connection.close()
        if self._offer is not None:
            self._offer.listener.close()

    def _heard(self, index: int | None) -> None:
        """Reads what a process has sent; None: a new one comes."""
        if index is None:
            self._accept()
            return
        line = self._lines[index]
        connection = line.connection
        if connection is None:
            return
        try:
            more = connection.recv(4096)
        except TimeoutError:
            return
        except OSError:
            more = b""
        if not more:
            self._selector.unregister(connection)
            connection.close()
            line.connection = None
            if line.left is None:
                self._lost(index, "is gone (killed, or crashed)", PEER_LOST)
            return
        line.idle = 0.0
        *whole, line.unread = (line.unread + more).split(b"\n")
        for text in whole:
            self._took(index, line, json.loads(text))

    def _accept(self) -> None:
        assert self._offer is not None
        connection, _ = self._offer.listener.accept()
        connection.settimeout(5.0)
        said = b""
        with suppress(OSError, ValueError):
            while not said.endswith(b"\n") and len(said) < 1024:
                more = connection.recv(1)
                if not more:
                    break
                said += more
            hello = json.loads(said)
            index = hello["index"] if isinstance(hello, dict) and hello.get("key") == self._offer.key else None
            if index in self._lines and self._lines[index].connection is None:
                self._take(index, connection)
                return
        connection.close()

    def _take(self, index: int, connection: socket.socket) -> None:
        connection.settimeout(1.0)
        self._lines[index].connection, self._lines[index].idle = connection, 0.0
        self._selector.register(connection, selectors.EVENT_READ, index)

    def _took(self, index: int, line: _Line, said: _Message) -> None:
        if "lost" in said:
            self._lost(int(said["lost"]), said["how"], int(said["code"]))
        elif "left" in said:
            line.left = int(said["left"])
            if said["now"]:
                self._lost(index, *_end_of(line.left, at_once=True))
            elif line.left not in _IN_ORDER:
                line.deadline = time.monotonic() + _GRACE
        else:
            line.step = int(said["step"])
            self._last = said.get("last")

    def _beat(self) -> _Message:
        return {"step": self.step, "last": self._slowest() if self._index == 0 else None}

    def _slowest(self) -> tuple[int, int, int]:
        """The process that has begun the fewest steps, how many, and the most that one has begun."""
        steps = {self._index: self.step, **{index: line.step for index, line in self._lines.items()}}
        slowest = min(steps, key=lambda index: steps[index])
        return slowest, steps[slowest], max(steps.values())

    def _tell(self, said: _Message, but: int | None = None) -> None:
        data = _encoded(said)
        with self._lock:
            for index, line in self._lines.items():
                if line.connection is not None and index != but:
                    with suppress(OSError):  # one that is gone is noticed where it is listened to
                        line.connection.sendall(data)

    def _lost(self, index: int, how: str, code: int) -> None:
        """Another process is lost: all others are told, and this one ends."""
        if self._over.is_set():
            return
        self._over.set()
        if self._index == 0:
            self._tell({"lost": index, "how": how, "code": code}, but=index)
            self._flush(but=index)
        own = self._own
        # Of a process that has said its own error nothing more is to be said.
        line = "" if own not in (None, *_IN_ORDER) else f"{self._named(index)} {how}: {_TAIL}"
        self._ended(line, code if own is None or own in _IN_ORDER else own)
        self._done.set()

    def _flush(self, but: int) -> None:
        """Waits until the others have closed: a process that ends before may take back what they have not read."""
        deadline = time.monotonic() + _FLUSH
        for index, line in self._lines.items():
            if line.connection is None or index == but:
                continue
            with suppress(OSError):
                line.connection.shutdown(socket.SHUT_WR)
                while time.monotonic() < deadline:
                    line.connection.settimeout(max(0.01, deadline - time.monotonic()))
                    if not line.connection.recv(4096):
                        break

    def _named(self, index: int) -> str:
        return f"process {index} on {self._hosts[index]}"


def _encoded(said: _Message) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _end_of(code: int, *, at_once: bool) -> tuple[str, int]:
    """How a process ended, in words, and the code that others end with."""
    if code == HUNG:
        return "hung, and its watchdog has ended it (code 70)", PEER_LOST
    if code == STOPPED and at_once:
        return "was told to stop, and has", STOPPED
    return f"has ended with code {code}, its log says why", code if code in _SHARED else PEER_LOST
