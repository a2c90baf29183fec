"""Between jax's client and its service in process 0, so that the death of process 0 is told by us.

jax's client ends its process by a C++ abort as soon as its connection closes, with lines that name nobody. It connects to this
relay instead, which passes all bytes on, and keeps the connection open when process 0 is gone: :mod:`jaxft.machine.processes.peers` has
noticed that, too.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress

_REACH = 10.0
_PAUSE = 0.1


class Relay:
    """Passes on what comes to a port of this machine."""

    def __init__(self, host: str, port: int, patience: float) -> None:
        self._target, self._patience = (host, port), patience
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._keep = True
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, name="jaxft-relay", daemon=True).start()

    def leave(self, code: int, *, at_once: bool) -> None:
        """From now on, connections end as they do: this process ends in order."""
        self._keep = False

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                self._listener.close()
                return
            threading.Thread(target=self._pass_on, args=(near,), name="jaxft-relay", daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        far = self._reached()
        if far is None:
            near.close()
            return
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with selectors.DefaultSelector() as selector:
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in selector.select():
                    if not _moved(key.fileobj, key.data):
                        far.close()
                        while self._keep and key.fileobj is far:
                            time.sleep(_PAUSE)
                        near.close()
                        return

    def _reached(self) -> socket.socket | None:
        """A connection to the service, which process 0 may be about to start."""
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            with suppress(OSError):
                far = socket.create_connection(self._target, timeout=_REACH)
                far.settimeout(None)
                return far
            time.sleep(_PAUSE)
        return None


def _moved(source: object, target: object) -> bool:
    """Passes on what is there; False if one of the two is gone."""
    assert isinstance(source, socket.socket)
    assert isinstance(target, socket.socket)
    try:
        data = source.recv(65536)
        target.sendall(data)
    except OSError:
        return False
    return bool(data)
