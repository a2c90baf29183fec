"""Processes that watch over each other: the protocol between threads of one process, and real processes that are killed and stopped."""

from __future__ import annotations

import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from processes.test_runs import arguments, port, start

from jaxft.errors import EXIT_CODES, PEER_LOST, UserError
from jaxft.machine.processes.peers import Peers, offered
from jaxft.machine.processes.relay import Relay

HOSTS = {0: "a", 1: "b", 2: "c"}
Ends = list["queue.Queue[tuple[str, int]]"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats that are soon heard; real processes have their own."""
    for name, seconds in {"_BEAT": 0.2, "_LOOK": 0.1, "_GRACE": 0.3}.items():
        monkeypatch.setattr(f"jaxft.machine.processes.peers.{name}", seconds)


@contextmanager
def watching(silence: float = 30.0) -> Iterator[tuple[list[Peers], Ends]]:
    """Three that watch, and what each has been ended with."""
    offer = offered()
    ends: Ends = [queue.Queue() for _ in HOSTS]
    peers = [Peers(i, HOSTS, silence, lambda line, code, i=i: ends[i].put((line, code))) for i in HOSTS]
    peers[0].listen(offer)
    for one in peers[1:]:
        one.reach("127.0.0.1", offer.said())
    until(lambda: all(line.connection for line in peers[0]._lines.values()))
    try:
        yield peers, ends
    finally:
        for one in peers:
            one.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def die(one: Peers) -> None:
    """What the kernel does with the connections of a process that is killed: it closes them."""
    one.close()


@pytest.mark.parametrize("dead", HOSTS)
def test_a_connection_that_closes_without_a_word_is_a_death(dead: int) -> None:
    with watching() as (peers, ends):
        die(peers[dead])
        for other in HOSTS.keys() - {dead}:
            line, code = ends[other].get(timeout=20)
            assert code == PEER_LOST in EXIT_CODES
            assert line.startswith(
                f"process {dead} on {HOSTS[dead]} is gone (killed, or crashed): this process ends too"
            )
            assert len(line) < 300


def test_silence_is_a_death_and_beats_are_none() -> None:
    with watching(silence=1.0) as (peers, ends):
        time.sleep(1.5)
        assert all(one.empty() for one in ends)
        peers[2]._tell = lambda said, but=None: None  # as of a process that was stopped: nothing closes
        line, code = ends[1].get(timeout=20)
        assert line.startswith("process 2 on c has been silent for 1 s (stopped, or its host is lost)")
        assert code == PEER_LOST


@pytest.mark.parametrize(
    ("code", "at_once", "expected", "shared"),
    [
        (70, True, "process 1 on b hung, and its watchdog has ended it (code 70): ", PEER_LOST),
        (130, True, "process 1 on b was told to stop, and has: ", 130),
        (2, False, "process 1 on b has ended with code 2, its log says why: ", 2),
        (1, True, "process 1 on b has ended with code 1, its log says why: ", PEER_LOST),
    ],
)
def test_who_ends_with_an_error_says_so(code: int, at_once: bool, expected: str, shared: int) -> None:
    with watching() as (peers, ends):
        peers[1].leave(code, at_once=at_once)
        die(peers[1])
        for other in (0, 2):
            line, found = ends[other].get(timeout=20)
            assert line.startswith(expected)
            assert found == shared


@pytest.mark.parametrize("code", [0, 130])
def test_who_leaves_in_order_is_missed_by_nobody(code: int) -> None:
    with watching(silence=1.0) as (peers, ends):
        for one in reversed(peers):
            one.leave(code, at_once=False)
        until(lambda: all(line.left == code for one in peers for line in one._lines.values()))
        for one in reversed(peers):
            die(one)
        time.sleep(1.5)
        assert all(one.empty() for one in ends)


def test_one_that_has_failed_hears_first_whether_another_is_gone() -> None:
    with watching() as (peers, ends):
        failed = threading.Thread(target=lambda: peers[2].leave(1, at_once=False))
        failed.start()
        die(peers[1])
        assert ends[2].get(timeout=20)[0].startswith("process 1 on b is gone")
        failed.join(20)
        assert peers[2]._own is None  # its error was told by nobody


def test_who_is_behind_is_known_to_all() -> None:
    with watching() as (peers, ends):
        assert peers[0].behind() is None
        peers[0].step, peers[1].step, peers[2].step = 9, 8, 9
        expected = "process 1 on b has begun 8 steps, others 9"
        until(lambda: peers[0].behind() == peers[2].behind() == expected)
        assert peers[1].behind() is None
        assert all(one.empty() for one in ends)


def test_strangers_are_not_taken_for_processes() -> None:
    offer = offered()
    first = Peers(0, HOSTS, 30.0, lambda line, code: None)
    first.listen(offer)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"index": 1, "key": "guessed"}\n', b"\xff\n", b""):
        # It may have closed before all of it was read, or even sent.
        with socket.create_connection(("127.0.0.1", offer.said()["port"]), timeout=10) as line, suppress(OSError):
            line.sendall(said)
            line.shutdown(socket.SHUT_WR)
            assert line.recv(1) == b""
    assert not any(line.connection for line in first._lines.values())
    first.close()


def test_a_port_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxft.machine.processes.peers._REACH", 0.3)
    with pytest.raises(UserError, match=r"process 0 on a cannot be reached on port \d+.*JAXFT_PEER_TIMEOUT=0"):
        Peers(1, HOSTS, 30.0, lambda line, code: None).reach("127.0.0.1", {"port": port(), "key": "x"})


def test_the_relay_passes_on_and_stays_open_when_the_service_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        relay = Relay("127.0.0.1", service.getsockname()[1], 10.0)
        host, _, number = relay.address.rpartition(":")
        with socket.create_connection((host, int(number)), timeout=10) as near:
            far, _ = service.accept()
            near.sendall(b"asked" * 100_000)
            got = b""
            while len(got) < 500_000:
                got += far.recv(65536)
            far.sendall(b"answered")
            assert (near.recv(8, socket.MSG_WAITALL), got) == (b"answered", b"asked" * 100_000)
            far.close()
            near.settimeout(0.5)
            with pytest.raises(TimeoutError):
                near.recv(1)
            relay.leave(0, at_once=False)
            near.settimeout(10)
            assert near.recv(1) == b""
        relay.close()


def lose(tmp_path: Path, dead: int, number: signal.Signals, silence: str) -> None:
    """Starts two processes, loses one in its steps, and sees how the other ends."""
    more = ("train.steps=100000", "eval.every=100000", "mesh.data=2")
    at, given = port(), arguments(tmp_path, "run", *more)
    running = [start(i, 2, at, tmp_path, given, {"JAXFT_PEER_TIMEOUT": silence}) for i in (0, 1)]
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_text()):
        assert all(one.poll() is None for one in running)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running[dead].send_signal(number)
    try:
        _, err = running[1 - dead].communicate(timeout=60)
    finally:
        running[dead].kill()
        running[dead].communicate(timeout=60)
    assert running[1 - dead].returncode == PEER_LOST, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"jaxft train: process {dead} on ")


def test_the_death_of_a_process_is_named_and_ends_the_other(tmp_path: Path) -> None:
    lose(tmp_path, 0, signal.SIGKILL, "20")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dead", "number"), [(1, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP), (1, signal.SIGABRT)]
)
def test_a_process_that_is_lost_is_named(tmp_path: Path, dead: int, number: signal.Signals) -> None:
    lose(tmp_path, dead, number, "5")
