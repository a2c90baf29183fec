"""What depends on how far a key is from its query, laid out as attention adds it.

Dims: N heads, S length.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

Array = jax.Array


def distances(length: int) -> np.ndarray:
    """[2 S - 1]: how many places behind its query each key stands that a query can have, from -(S - 1) to S - 1."""
    return np.arange(1 - length, length)


def by_distance(x: Float[Array, "*rows S distances"]) -> Float[Array, "*rows S S"]:
    """[..., S, 2 S - 1], what each query has for keys at each of the :func:`distances`, as [..., S, S]: for each key.

    Rows are shifted against each other by a change of shape (Huang et al. 2018): there is nothing to gather, nor to scatter in the
    backward pass.
    """
    *rows, s, count = x.shape
    if count != 2 * s - 1:
        raise ValueError(f"{count} distances of {s} places: there are {2 * s - 1}")
    flat = jnp.pad(x, [(0, 0)] * (len(rows) + 1) + [(0, 1)]).reshape(*rows, 2 * s * s)
    return flat[..., s - 1 : s - 1 + s * count].reshape(*rows, s, count)[..., :s]
