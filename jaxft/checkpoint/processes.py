"""The little that several processes must agree on. All do nothing in a single process.

Assumed for more than one: a file system that all share, and that all call the same functions in the same order.
"""

from __future__ import annotations

import jax
import numpy as np


def is_first() -> bool:
    """Whether this process is the one that hashes, writes manifests and deletes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxft checkpoint {name}")


def first_says(value: int) -> int:
    """The value that process 0 gave."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def anyone(value: bool) -> bool:
    """Whether it is true in any process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(value))))
