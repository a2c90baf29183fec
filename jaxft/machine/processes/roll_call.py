"""A meeting of the processes before jax starts, which names those that are missing after a while.

jax's own meeting ends a process with a C++ abort when another one does not come, and does not say which. So process 0
first listens on the very port that jax will use: each other process comes and says its number, host, versions and
command; process 0 answers when all are there and agree, or tells everyone what is wrong.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypedDict, TypeGuard

from jaxft.errors import UserError
from jaxft.machine.processes.cluster import Cluster

Told = Mapping[str, str | int]
"""What process 0 tells all."""
_LONGEST = 64 * 1024  # bytes of a message
_PAUSE = 0.2
_GRACE = 3.0  # seconds in which those that come after a problem are told of it, rather than find nobody
_AGAIN = 30.0  # seconds that the last try of a run may hold the port


class _Presence(TypedDict):
    """What a process says when it comes."""

    index: int
    count: int
    host: str
    pid: int
    says: dict[str, str]


@dataclass(frozen=True)
class Roll:
    """What a process knows once all are there."""

    hosts: dict[int, str]
    """The host of each."""
    told: Told = field(default_factory=dict)
    """What process 0 has told all."""


def roll_call(
    cluster: Cluster, says: dict[str, str], timeout: float, tells: Told | None = None, *, again: bool = False
) -> Roll:
    """Returns, in every process, once all are there.

    Args:
      says: what must be equal in all processes, such as versions; a difference is an error that shows both values.
      timeout: seconds to wait.
      tells: what process 0 tells all.
      again: whether this is another try of a run, of whose last one something may still listen for a while.

    Raises:
      UserError: the same in all processes that came: who is missing, who came twice, who differs.
    """
    host, _, port = cluster.address.rpartition(":")
    mine: _Presence = {
        "index": cluster.index,
        "count": cluster.count,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "says": says,
    }
    deadline = time.monotonic() + timeout
    if cluster.index == 0:
        return _call(cluster, int(port), mine, deadline, timeout, {} if tells is None else tells, again)
    return _answer(cluster, host.strip("[]"), int(port), mine, deadline, timeout, again)


def _call(
    cluster: Cluster, port: int, mine: _Presence, deadline: float, timeout: float, tells: Told, again: bool
) -> Roll:
    came, lines = {0: mine}, dict[int, socket.socket]()
    problem = None
    with _listening(port, _AGAIN if again else 0.0) as listener:
        while True:
            _drop_ended(came, lines)
            if len(came) == cluster.count:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                problem = problem or _missing(cluster, came, timeout)
                break
            listener.settimeout(min(left, 1.0))
            try:
                line, _ = listener.accept()
            except TimeoutError:
                continue
            one = _received(line)
            if one is None:  # not one of ours
                line.close()
                continue
            _drop_ended(came, lines)
            found = _problem_of(one, mine, came, cluster)
            if found is not None and problem is None:
                problem, deadline = found, min(deadline, time.monotonic() + _GRACE)
            came.setdefault(one["index"], one)
            # Of two with one number both are told.
            lines[one["index"] if one["index"] not in lines else -1 - len(lines)] = line
        hosts = {index: one["host"] for index, one in sorted(came.items())}
        for line in lines.values():
            line.settimeout(5.0)
            with suppress(OSError):  # one that has gone will be missed by jax
                line.sendall(json.dumps({"problem": problem, "hosts": hosts, "told": tells}).encode() + b"\n")
                line.recv(1)  # it closes first, so nothing lingers here: the port is free for jax at once
            line.close()
    if problem is not None:
        raise UserError(problem)
    return Roll(hosts, tells)


@contextmanager
def _listening(port: int, patience: float) -> Iterator[socket.socket]:
    deadline = time.monotonic() + patience
    while True:
        try:
            listener = socket.create_server(("", port), backlog=1024)
            break
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(_PAUSE)
                continue
            raise UserError(
                f"process 0 cannot listen on port {port}: {os.strerror(error.errno or 0)}; another run may use it: choose another "
                "JAX_COORDINATOR_ADDRESS"
            ) from error
    with listener:
        yield listener


def _answer(
    cluster: Cluster, host: str, port: int, mine: _Presence, deadline: float, timeout: float, again: bool
) -> Roll:
    where = f"{cluster.host_of(0)} (JAX_COORDINATOR_ADDRESS={cluster.address})"
    reason = "nothing listens there"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())) as line:
                line.sendall(json.dumps(mine).encode() + b"\n")
                # Process 0 may have come later than we have: it waits as long, counted from then.
                answer = _read(line, timeout + 10.0)
            if not isinstance(answer, dict) or not {"problem", "hosts", "told"} <= answer.keys():
                if again and time.monotonic() < deadline:
                    reason = "something else listens there"
                    time.sleep(_PAUSE)
                    continue
                raise UserError(
                    f"{where} ended before all had come, and its log says why; or something else listens there"
                )
            if answer["problem"] is not None:
                raise UserError(answer["problem"])
            return Roll({int(index): name for index, name in answer["hosts"].items()}, answer["told"])
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(_PAUSE)
    raise UserError(f"{where} did not answer within {timeout:.0f} s: {reason}; is it running, and the port open?")


def _received(line: socket.socket) -> _Presence | None:
    one = _read(line, 5.0)
    return one if _is_presence(one) else None


def _is_presence(one: object) -> TypeGuard[_Presence]:
    keys = {"index": int, "count": int, "host": str, "pid": int, "says": dict}
    return isinstance(one, dict) and all(isinstance(one.get(key), kind) for key, kind in keys.items())


def _read(line: socket.socket, seconds: float) -> object:
    """One line of JSON, or None."""
    data, deadline = b"", time.monotonic() + seconds
    with suppress(OSError, ValueError):
        while not data.endswith(b"\n") and len(data) < _LONGEST:
            line.settimeout(max(0.001, deadline - time.monotonic()))
            more = line.recv(4096)
            if not more:
                break
            data += more
        return json.loads(data)
    return None


def _drop_ended(came: dict[int, _Presence], lines: dict[int, socket.socket]) -> None:
    """Whoever has ended while waiting is missing again, and may be started anew."""
    for index in [index for index, line in lines.items() if _closed(line)]:
        lines.pop(index).close()
        came.pop(index, None)


def _closed(line: socket.socket) -> bool:
    """Whether the other side has gone; it says nothing more while it waits."""
    line.setblocking(False)
    try:
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _problem_of(one: _Presence, mine: _Presence, came: dict[int, _Presence], cluster: Cluster) -> str | None:
    index = one["index"]
    who = f"process {index} on {one['host']}"
    if one["count"] != cluster.count:
        return f"{who} was told of {one['count']} processes, process 0 of {cluster.count}: launch all alike"
    if index in came:
        return f"two processes have number {index}: on {came[index]['host']} and on {one['host']}; give each its own"
    if not 0 < index < cluster.count:
        return f"{who}: numbers must lie in 0..{cluster.count - 1}"
    for name, value in mine["says"].items():
        if one["says"].get(name) != value:
            return f"{who} has another {name}: {one['says'].get(name)!r}, process 0 has {value!r}; make them equal"
    return None


def _missing(cluster: Cluster, came: dict[int, _Presence], timeout: float) -> str:
    absent = [index for index in range(cluster.count) if index not in came]
    shown = ", ".join(cluster.host_of(index) for index in absent[:8])
    more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
    there = ", ".join(f"{index} on {one['host']}" for index, one in sorted(came.items())[:8])
    return (
        f"{len(absent)} of {cluster.count} processes did not come within {timeout:.0f} s: {shown}{more}; there are: {there}; "
        "look at the log of the missing, and whether they can reach the coordinator"
    )
