"""The little that several processes must agree on. All do nothing in a single process.

Assumed for more than one: that all call the same functions in the same order.
jax is imported where it is used: a parent process that only starts and watches others does without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxft.errors import UserError

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jaxtyping import PyTree


def is_first() -> bool:
    """Whether this process is the one that hashes, writes manifests, logs and reports, and deletes."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process has come here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxft {name}")


def first_says(value: int) -> int:
    """The value that process 0 gave."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def anyone(value: bool) -> bool:
    """Whether it is true in any process."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
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
    import jax

    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)
