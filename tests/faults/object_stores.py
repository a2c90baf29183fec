"""Object stores on this machine (moto's S3, an emulator of GCS) behind a proxy that puts faults into what passes through it."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

KINDS = ("503", "500", "refused", "answer lost", "cut")
"""Throttled; a server's error; cut before the request was read; the same after it was carried out; in the middle of an answer."""
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_BROKEN = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


@dataclass
class Faults:
    """Which requests fail, how, and how many did."""

    share: float = 0.0
    """Of the requests."""
    kinds: tuple[str, ...] = KINDS
    most: int | None = None
    """Faults in all; None: no end."""
    only: str = ""
    """A part of the path of those that may fail."""
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    counts: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    puts: Counter[str] = field(default_factory=Counter)
    """By path, how often an object was put, or tried to be."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, method: str, path: str) -> str | None:
        """The fault of a request, if it has one."""
        with self._lock:
            self.requests += 1
            self.puts[path] += method == "PUT"
            done = self.most is not None and self.counts.total() >= self.most
            if done or self.only not in path or self.rng.random() >= self.share:
                return None
            kind = self.rng.choice(self.kinds)
            self.counts[kind] += 1
            return kind


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: ClassVar[Faults]
    upstream: ClassVar[tuple[str, int]]

    def _pass_on(self) -> None:
        fault = self.faults.next(self.command, self.path)
        body = self._body()
        if fault in ("503", "500"):
            self._answer(int(fault), [("Content-Type", "application/xml")], _SLOW_DOWN if fault == "503" else _BROKEN)
            return
        if fault == "refused":
            self._cut()
            return
        connection = HTTPConnection(*self.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            response = connection.getresponse()
            content = response.read()
        except (HTTPException, OSError):
            self._cut()
            return
        finally:
            connection.close()
        if fault == "answer lost":
            self._cut()
            return
        dropped = ("transfer-encoding", "connection", "content-length")
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self._answer(response.status, headers, content, length, cut=fault == "cut")

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        length: str | None = None,
        *,
        cut: bool = False,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.close_connection = True  # the other side was quicker

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that are cut are what it is for."""


@contextmanager
def faulty(upstream: tuple[str, int], faults: Faults) -> Iterator[str]:
    """The address of a proxy before a store."""
    handler = type("Proxy", (_Proxy,), {"faults": faults, "upstream": upstream})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """A moto server with nothing in it."""
    with _started([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]) as place:
        yield place


@contextmanager
def gcs_server() -> Iterator[tuple[str, int]]:
    """An emulator of GCS with nothing in it."""
    command = "import sys; from gcp_storage_emulator.__main__ import main; main(sys.argv[1:])"
    with _started([sys.executable, "-c", command, "start", "--host=127.0.0.1", "--in-memory", "--port"]) as place:
        yield place


@contextmanager
def _started(command: list[str]) -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    server = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command}: did not start") from None
                time.sleep(0.1)
        yield "127.0.0.1", port
    finally:
        server.kill()
        server.wait()


def environment_of(endpoint: str) -> dict[str, str]:
    """Variables under which s3:// is the store at ``endpoint``."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
