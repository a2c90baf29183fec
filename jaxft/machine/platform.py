"""Prepares the process for jax, before jax is imported: which platforms it may look for, its compilation cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from jaxft.machine.compile_cache import open_cache

COMPILE_ENV = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

_USUAL: dict[str, str | bool] = {
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_transfer_guard": "allow",
    "jax_disable_jit": False,
}
"""Switches for finding mistakes in one's own code, as a command needs them: its programs are compiled ahead, arrays go where it says."""
_GOOGLE = "0x1ae0"  # PCI vendor of TPUs (and of network cards of Google Cloud)


def set_up_jax(cache: str | None) -> None:
    """Turns on XLA's persistent compilation cache, keeps jax from looking for TPUs where there are none, and keeps the
    libraries' chatter off the console.

    Args:
      cache: folder of the compilation cache; None: off.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    look_for_no_tpu()
    import jax

    for name, usual in _USUAL.items():
        found = getattr(jax.config, name)
        if found is not None and found != usual:
            print(f"{name.upper()}={found} is set aside: this command needs {usual}", file=sys.stderr)
            jax.config.update(name, usual)
    if cache is not None:
        open_cache(cache)


def look_for_no_tpu() -> None:
    """Tells jax by the environment, for this process and those that it starts, to leave libtpu alone where there is no TPU."""
    if tpu_may_be_there():
        return
    for name, value in COMPILE_ENV.items():
        os.environ.setdefault(name, value)
    platforms = platforms_without_tpu()
    if platforms is not None:
        os.environ.setdefault("JAX_PLATFORMS", platforms)


def tpu_may_be_there() -> bool:
    """Whether this machine has a device file that a TPU could be behind."""
    if "JAX_FORCE_TPU_INIT" in os.environ or Path("/dev/accel0").exists():
        return True
    # Newer TPUs are driven through VFIO, which other machines have too.
    return Path("/dev/vfio").exists() and any(
        vendor.read_text().strip() == _GOOGLE for vendor in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def platforms_without_tpu() -> str | None:
    """``JAX_PLATFORMS`` for a machine without TPUs where libtpu is installed all the same, for ``jaxft plan``; None: leave it
    to jax.

    Once jax has only looked for a TPU, libtpu is part of every trace, and traces of CPU programs end in a segmentation
    fault (jaxlib 0.10.2 with libtpu 0.0.52); the look itself takes seconds.
    """
    if importlib.util.find_spec("libtpu") is None:
        return None
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    if any(not name.startswith("xla_cuda") for name in plugins):
        return None  # of another make, whose platform has a name that we do not know
    return "cuda,cpu" if plugins else "cpu"
