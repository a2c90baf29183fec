"""What depends on how far a key is from its query, laid out as attention adds it.

Dims: N heads, S length.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

Array = jax.Array


def distances(length: int) -> np.ndarray:
    """[2 S - 1]: how many places behind its query each key stands that a query can have, from -(S - 1) to S - 1."""
    return np.arange(1 - length, length)


def buckets(distances: np.ndarray, count: int, farthest: int, *, behind: bool = True) -> np.ndarray:
    """The range that each distance of a key from its query is in (Raffel et al. 2020): small ones have their own, then logarithms are
    rounded down, up to those of ``farthest`` and beyond.

    Args:
      count: ranges.
      behind: half of them are of keys behind the query. If not, all keys behind it count as the query's own.
    """
    half = count // 2 if behind else count
    far = np.abs(distances) if behind else np.maximum(-distances, 0)
    exact = half // 2
    # In float32, as the reference counts: where a range ends, the last digit decides.
    logs = np.log(np.maximum(far, exact).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(farthest / exact)
    )
    wide = exact + (logs * np.float32(half - exact)).astype(np.int32)
    before = np.where(far < exact, far, np.minimum(wide, half - 1))
    return np.where(distances > 0, half, 0) + before if behind else before


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
