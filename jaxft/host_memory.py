"""Keeping freed memory in the process: on CPUs, the cost of fresh pages was a quarter of a training step.

XLA's CPU backend allocates a step's temporaries anew each time (hundreds of MB). glibc serves requests of that size with
``mmap`` and gives them back at once, so that each step pays for zeroing every page again.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def cpu_only() -> bool:
    """Whether jax will find no accelerator; asked without starting it, since its threads keep the settings they start with."""
    if "JAX_PLATFORMS" in os.environ:
        return os.environ["JAX_PLATFORMS"] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed, in one arena. False: not glibc.

    To be called before jax starts its threads, where memory of the process is what arrays live in: on CPUs.

    One arena, because requests that do not fit into a thread's own arena are served by ``mmap`` whatever the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(option, value) == 1 for option, value in settings)
