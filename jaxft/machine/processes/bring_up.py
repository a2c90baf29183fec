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
from jaxft.machine.processes.cluster import Cluster, detect
from jaxft.machine.processes.roll_call import roll_call

_TIMEOUT = 300.0
_LOOK_SECONDS = 1.0


def start(note: Callable[[str], None]) -> Cluster | None:
    """Joins the run that the environment describes (:func:`detect`); None and nothing done if this process is alone.

    To be called before anything touches a device. ``JAXFT_START_TIMEOUT`` is how many seconds processes wait for each
    other (300).

    Raises:
      UserError: the environment contradicts itself, or processes are missing or differ.
    """
    cluster = detect(os.environ)
    if cluster is None:
        return None
    virtual = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if virtual is not None and int(virtual[1]) > 1:
        raise UserError(
            f"XLA_FLAGS makes {virtual[1]} virtual devices per process: with several processes such runs hang; unset it"
        )
    stop_without_launcher(os.environ)
    timeout = _timeout()
    hosts = roll_call(cluster, _says(), timeout)
    import jax

    jax.distributed.initialize(
        cluster.address,
        cluster.count,
        cluster.index,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
    )
    if cluster.index == 0:
        note(f"{cluster.count} processes ({cluster.kind}): {', '.join(f'{i} on {host}' for i, host in hosts.items())}")
    return cluster


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


def _timeout() -> float:
    text = os.environ.get("JAXFT_START_TIMEOUT", str(_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"JAXFT_START_TIMEOUT={text!r}: expected seconds")
    return seconds


def _says() -> dict[str, str]:
    """What must be equal in all processes."""
    from importlib.metadata import version

    return {
        "version of jaxft": version("jaxft"),
        "version of jax": version("jax"),
        "command": shlex.join(sys.argv[1:]),
    }
