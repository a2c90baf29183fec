"""From the environment to a started jax.distributed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

from jaxft.errors import UserError
from jaxft.machine import signals
from jaxft.machine.processes.cluster import Cluster, detect
from jaxft.machine.processes.peers import Offer, Peers, offered
from jaxft.machine.processes.relay import Relay
from jaxft.machine.processes.roll_call import Roll, roll_call

TRY = "JAXFT_TRY"
"""Names the environment variable that counts how often a run was started again."""
_TIMEOUT = 300.0
_SILENCE = 20.0
_LOOK_SECONDS = 1.0


def start(note: Callable[[str], None]) -> Cluster | None:
    """Joins the run that the environment describes (:func:`detect`); None and nothing done if this process is alone.

    To be called before anything touches a device. ``JAXFT_START_TIMEOUT`` is how many seconds processes wait for each
    other (300), ``JAXFT_PEER_TIMEOUT`` after how many seconds without a word one counts as lost (20; 0: never).

    Raises:
      UserError: the environment contradicts itself, or processes are missing or differ.
    """
    stop_without_launcher(os.environ)
    cluster = detect(os.environ)
    if cluster is None:
        return None
    virtual = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if virtual is not None and int(virtual[1]) > 1:
        raise UserError(
            f"XLA_FLAGS makes {virtual[1]} virtual devices per process: with several processes such runs hang; unset it"
        )
    timeout, silence = _seconds("JAXFT_START_TIMEOUT", _TIMEOUT), silence_of()
    offer = offered() if cluster.index == 0 and silence else None
    tells = {} if offer is None else offer.said()
    roll = roll_call(cluster, _says(), timeout, tells, again=os.environ.get(TRY, "0") != "0")
    _watch(cluster, roll, silence, offer)
    host, _, port = cluster.address.rpartition(":")
    address = cluster.address
    if cluster.index and _peers is not None:
        relay = Relay(host.strip("[]"), int(port), timeout)
        signals.leaving.append(relay.leave)
        address = relay.address
    import jax

    # Its wait for the others holds Python's lock, which the relay needs: they would never answer. See `stopping`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        cluster.count,
        cluster.index,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
    )
    if cluster.index == 0:
        note(
            f"{cluster.count} processes ({cluster.kind}): {', '.join(f'{i} on {host}' for i, host in roll.hosts.items())}"
        )
    return cluster


_peers: Peers | None = None


def _watch(cluster: Cluster, roll: Roll, silence: float, offer: Offer | None) -> None:
    """Begins to watch over the others, unless process 0 does without."""
    global _peers
    if not roll.told:
        return
    _peers = Peers(cluster.index, roll.hosts, silence or _SILENCE, _ended)
    if offer is not None:
        _peers.listen(offer)
    else:
        _peers.reach(cluster.address.rpartition(":")[0].strip("[]"), roll.told)
    signals.leaving.append(_peers.leave)


def _ended(line: str, code: int) -> None:
    program = signals.program()
    if program is not None:
        program.end(line, code)
    print(f"warning: {line}", file=sys.stderr, flush=True)  # part of someone else's program


def at_step(step: int) -> None:
    """Notes which step this process begins; the others hear of it."""
    if _peers is not None:
        _peers.step = step


def behind() -> str | None:
    """Which other process has begun fewer steps than the rest, in words; None: no other has."""
    return None if _peers is None else _peers.behind()


def stop_without_launcher(environ: Mapping[str, str]) -> None:
    """Watches over the script that started this process, if it says its number: once it is gone, however, SIGTERM stops the run.

    Nobody would see the run go on, nor know what to stop.
    """
    text = environ.get("JAXFT_LAUNCHER_PID", "")
    if not text:
        return
    if not text.isdecimal():
        raise UserError(f"JAXFT_LAUNCHER_PID={text!r}: expected the number of the process that started this one")

    def look() -> None:
        while os.getppid() == int(text):
            time.sleep(_LOOK_SECONDS)
        print("the launcher has ended: stopping as if told to", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="jaxft-launcher", daemon=True).start()


def leave() -> None:
    """Leaves the run, once all its processes do; for a process that will not come to the end of Python's own shutdown."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def silence_of() -> float:
    """After how many seconds without a word another process counts as lost; 0: never."""
    return _seconds("JAXFT_PEER_TIMEOUT", _SILENCE, may_be_0=True)


def _seconds(name: str, usual: float, *, may_be_0: bool = False) -> float:
    text = os.environ.get(name, str(usual))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (0 < seconds < 1e6 or (may_be_0 and seconds == 0)):
        raise UserError(f"{name}={text!r}: expected seconds")
    return seconds


def _says() -> dict[str, str]:
    """What must be equal in all processes."""
    from importlib.metadata import version

    return {
        "version of jaxft": version("jaxft"),
        "version of jax": version("jax"),
        "command": shlex.join(sys.argv[1:]),
    }
