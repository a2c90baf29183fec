"""The little that several processes must agree on. All do nothing in a single process.

Assumed for more than one: a file system that all share, and that all call the same functions in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jaxtyping import PyTree

from jaxft.errors import UserError


def is_first() -> bool:
    """Whether this process is the one that hashes, writes manifests, logs and reports, and deletes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxft {name}")


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


@contextmanager
def raise_together() -> Iterator[None]:
    """If the block ends with a UserError in one process, it does in all: nobody waits for one that has given up.

    The block itself must not wait for other processes.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    if anyone(problem is not None):
        raise problem or UserError("another process has given up; its log says why")


def fetch(tree: PyTree[jax.Array]) -> PyTree[jax.Array | np.ndarray]:
    """Whole arrays in numpy, in every process, of arrays spread over the devices of all."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)
