"""The roll call over real sockets: each participant a thread, as many as a run has processes."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from jaxft.errors import UserError
from jaxft.machine.processes.cluster import Cluster
from jaxft.machine.processes.roll_call import roll_call

SAYS = {"version of jaxft": "1", "command": "train a.yaml"}
HERE = socket.gethostname()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def cluster(port: int, index: int, count: int, hosts: tuple[str, ...] = ()) -> Cluster:
    return Cluster("environment", f"127.0.0.1:{port}", count, index, hosts)


def outcome(one: Cluster, says: dict[str, str] = SAYS, timeout: float = 20.0) -> dict[int, str] | str:
    """The hosts, or the message of the UserError."""
    try:
        return roll_call(one, says, timeout).hosts
    except UserError as error:
        return str(error)


def together(*calls: Callable[[], dict[int, str] | str]) -> list[dict[int, str] | str]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(timeout=60) for future in [threads.submit(call) for call in calls]]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reached(port: int) -> socket.socket:
    """A connection to process 0, once it listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_all_come_and_the_port_is_free_at_once() -> None:
    port = free_port()
    answers = together(*(lambda i=i: outcome(cluster(port, i, 12)) for i in reversed(range(12))))
    assert answers == [dict.fromkeys(range(12), HERE)] * 12
    # No SO_REUSEADDR, which would hide a connection that lingers on this side.
    with socket.socket() as server:
        server.bind(("", port))


def test_processes_of_their_own() -> None:
    """The same between real processes; the first comes last."""
    port = free_port()
    program = (
        "import sys; from jaxft.machine.processes.cluster import Cluster; from jaxft.machine.processes.roll_call import roll_call; "
        f"print(sorted(roll_call(Cluster('environment', '127.0.0.1:{port}', 3, int(sys.argv[1])), {{}}, 20.0).hosts))"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", program, str(i)], stdout=subprocess.PIPE, text=True) for i in (1, 2)
    ]
    time.sleep(0.3)
    assert outcome(cluster(port, 0, 3), {}) == dict.fromkeys(range(3), HERE)
    assert [other.communicate(timeout=30)[0] for other in others] == ["[0, 1, 2]\n"] * 2


def test_one_that_is_missing_is_named_to_all() -> None:
    port, hosts = free_port(), ("a", "b", "c", "d")
    answers = together(*(lambda i=i: outcome(cluster(port, i, 4, hosts), timeout=1.0) for i in (0, 1, 3)))
    assert len(set(map(str, answers))) == 1
    message = answers[0]
    assert isinstance(message, str)
    assert message.startswith("1 of 4 processes did not come within 1 s: process 2 on c; there are: ")
    assert f"there are: 0 on {HERE}, 1 on {HERE}, 3 on {HERE}; look at the log of the missing" in message


def test_many_missing_are_counted() -> None:
    message = outcome(cluster(free_port(), 0, 100), timeout=0.3)
    assert isinstance(message, str)
    assert message.startswith("99 of 100 processes did not come within 0 s: process 1, process 2,")
    assert "process 8 and 91 more; there are: 0 on" in message


def test_two_with_one_number_are_told_as_all() -> None:
    port = free_port()
    answers = together(*(lambda i=i: outcome(cluster(port, i, 4)) for i in (0, 1, 2, 2)))
    message = f"two processes have number 2: on {HERE} and on {HERE}; give each its own"
    assert answers == [message] * 4


def test_two_coordinators_on_one_host() -> None:
    """Two processes of number 0: the second cannot listen."""
    port = free_port()
    answers = together(*(lambda: outcome(cluster(port, 0, 2), timeout=1.0) for _ in range(2)))
    assert sum("cannot listen on port" in str(answer) for answer in answers) == 1
    assert sum("1 of 2 processes did not come" in str(answer) for answer in answers) == 1


@pytest.mark.parametrize(
    ("says", "count", "message"),
    [
        (
            SAYS | {"command": "train b.yaml"},
            2,
            f"process 1 on {HERE} has another command: 'train b.yaml', process 0 has 'train a.yaml'; make them equal",
        ),
        (
            SAYS | {"version of jaxft": "2"},
            2,
            f"process 1 on {HERE} has another version of jaxft: '2', process 0 has '1'; make them equal",
        ),
        ({}, 2, f"process 1 on {HERE} has another version of jaxft: None, process 0 has '1'; make them equal"),
        (SAYS, 3, f"process 1 on {HERE} was told of 3 processes, process 0 of 2: launch all alike"),
    ],
)
def test_differences_are_told_to_both(says: dict[str, str], count: int, message: str) -> None:
    port = free_port()
    answers = together(lambda: outcome(cluster(port, 0, 2)), lambda: outcome(cluster(port, 1, count), says))
    assert answers == [message] * 2


def test_strangers_are_ignored() -> None:
    """What a port scanner, a health check or another program may send."""
    port = free_port()

    def strangers() -> str:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\n", b"[1, 2]\n", b'{"index": 1}\n', b"x" * 70_000):
            with reached(port) as line, suppress(OSError):  # it has closed before reading all of it
                line.sendall(said)
                line.shutdown(socket.SHUT_WR)
                assert line.recv(1) == b""
        result = outcome(cluster(port, 1, 2))
        return str(result)

    first, other = together(lambda: outcome(cluster(port, 0, 2)), strangers)
    assert first == {0: HERE, 1: HERE}
    assert other == str(first)


def test_a_silent_stranger_delays_but_does_not_hold_up() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(outcome, cluster(port, 0, 2))
        with reached(port) as silent:
            other = threads.submit(outcome, cluster(port, 1, 2))
            stop = threading.Event()

            def drip() -> None:  # a byte now and then must not buy it more time
                while not stop.wait(0.5):
                    try:
                        silent.sendall(b" ")
                    except OSError:
                        return

            dripping = threading.Thread(target=drip)
            dripping.start()
            began = time.monotonic()
            assert other.result(timeout=20) == first.result(timeout=20) == {0: HERE, 1: HERE}
            assert time.monotonic() - began < 10
            stop.set()
            dripping.join()


def test_one_that_ended_while_waiting_may_come_again() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(outcome, cluster(port, 0, 3))
        with reached(port) as line:
            line.sendall(b'{"index": 1, "count": 3, "host": "old", "pid": 1, "says": {"version of jaxft": "1", ')
            line.sendall(b'"command": "train a.yaml"}}\n')
            time.sleep(0.3)
        again = threads.submit(outcome, cluster(port, 1, 3))
        time.sleep(0.3)
        assert not first.done()
        last = threads.submit(outcome, cluster(port, 2, 3))
        expected = dict.fromkeys(range(3), HERE)
        assert [one.result(timeout=20) for one in (first, again, last)] == [expected] * 3


def test_one_that_ended_while_waiting_is_missing() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(outcome, cluster(port, 0, 3), timeout=2.0)
        with reached(port) as line:
            line.sendall(b'{"index": 1, "count": 3, "host": "old", "pid": 1, "says": {"version of jaxft": "1", ')
            line.sendall(b'"command": "train a.yaml"}}\n')
            time.sleep(0.3)
        assert "2 of 3 processes did not come within 2 s: process 1, process 2" in str(first.result(timeout=20))


def test_a_coordinator_that_is_absent() -> None:
    port = free_port()
    began = time.monotonic()
    message = outcome(cluster(port, 1, 2, ("a", "b")), timeout=0.6)
    assert time.monotonic() - began < 3
    assert message == (
        f"process 0 on a (JAX_COORDINATOR_ADDRESS=127.0.0.1:{port}) did not answer within 1 s: Connection refused; "
        "is it running, and the port open?"
    )


def test_a_coordinator_whose_name_is_unknown() -> None:
    message = outcome(Cluster("slurm", "no-such-host.invalid:1", 2, 1), timeout=0.5)
    assert "did not answer within 0 s" in str(message)


def test_a_coordinator_that_comes_late_gives_its_verdict() -> None:
    """Process 1 has waited for almost its whole time when process 0 comes, and hears what that finds, later."""
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(outcome, cluster(port, 1, 3), timeout=2.0)
        time.sleep(1.5)
        first = threads.submit(outcome, cluster(port, 0, 3), timeout=2.0)
        assert other.result(timeout=20) == first.result(timeout=20)
        assert "1 of 3 processes did not come within 2 s: process 2" in str(first.result())


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[]\n", b'{"hosts": {}}\n', b"\x00\x04\xff"]
)
def test_another_program_on_the_port(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
        port = server.getsockname()[1]
        other = threads.submit(outcome, cluster(port, 1, 2))
        line, _ = server.accept()
        with line:
            line.recv(4096)
            line.sendall(answer)
        assert "ended before all had come, and its log says why; or something else listens there" in str(
            other.result(20)
        )


def test_a_port_in_use() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        message = outcome(cluster(port, 0, 2))
    assert message == (
        f"process 0 cannot listen on port {port}: Address already in use; another run may use it: choose another "
        "JAX_COORDINATOR_ADDRESS"
    )
