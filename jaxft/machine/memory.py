"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int | None:
    """The resident size now; None where the system does not say (it has no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def device_bytes() -> int | None:
    """The most that this process's first device has held so far; None where the backend does not count (CPUs)."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def release_freed() -> None:
    """Gives freed heap memory back to the system, where the C library is glibc.

    After compiling, XLA leaves some hundred MB of it, which would lie beside the arrays of every step.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
