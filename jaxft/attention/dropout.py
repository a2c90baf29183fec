"""Dropout of attention probabilities whose random bits are a function of the place alone.

The bit of query s and key t of head n in row b is made of the key and of (b, n, s, t): any block of an attention matrix can be
made by itself, on any device, and is the same.

Dims: B batch, S query length, T key length, N query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from jaxft.layers import FixedRate, Rate, RunTimeRate, hash_words, keep_at, known_rate

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """Which probabilities are kept."""

    words: tuple[Array, Array]
    """Two uint32: the key."""
    rows: Array
    """[B, N] uint32, b N + n counted over all devices; or a part of it."""
    rate: FixedRate | RunTimeRate
    length: int = field(metadata={"static": True})
    """Keys of a whole row, T."""
    bits: Literal["threefry", "hash"] = field(default="threefry", metadata={"static": True})

    @property
    def scale(self) -> np.float32 | Array:
        """What kept probabilities are multiplied by."""
        return self.rate.scale

    def kept(self, queries: Array, first_key: Array | int, keys: int) -> Array:
        """Bool of the shape of ``rows`` + [S, ``keys``]: what stays for ``queries`` [S] (their numbers in the row) and the
        ``keys`` keys from ``first_key`` on."""
        queries = queries.astype(jnp.uint32)[:, None]
        rows = self.rows[..., None, None]
        if self.bits == "hash":
            place = jnp.asarray(first_key, jnp.uint32) + jnp.arange(keys, dtype=jnp.uint32)
            return keep_at(self.words, self.rate, rows, queries * np.uint32(self.length) + place)[0]
        # One word serves two neighbouring keys.
        aligned = isinstance(first_key, int) and first_key % 2 == 0
        words = (keys + 1) // 2 if aligned else keys // 2 + 1
        first = jnp.asarray(first_key, jnp.uint32)
        place = first // 2 + jnp.arange(words, dtype=jnp.uint32)
        halves = _threefry(self.words, rows, queries * np.uint32((self.length + 1) // 2) + place)
        if aligned:
            return self.rate.keeps(halves[..., :keys])
        return self.rate.keeps(lax.dynamic_slice_in_dim(halves, (first % 2).astype(jnp.int32), keys, axis=-1))


def make_dropout(
    key: Array, rate: Rate, batch: int, heads: int, queries: int, keys: int, bits: Literal["threefry", "hash"]
) -> Dropout:
    """The dropout of a whole batch of rows of so many queries and keys.

    Raises:
      ValueError: rows are so long that places do not fit 32 bits.
    """
    if (length := max(queries, keys)) > 65536:
        raise ValueError(f"dropout of attention: rows of {length} tokens; at most 65536, for a place must fit 32 bits")
    data = jax.random.key_data(key)
    # Keys of other kinds (rbg) hold four words: hashed to two, they serve as a threefry key.
    words = hash_words(key) if bits == "hash" or data.shape != (2,) else (data[0], data[1])
    rows = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads)
    return Dropout(words, rows, known_rate(rate), keys, bits)


def _threefry(words: tuple[Array, Array], high: Array, low: Array) -> Array:
    """uint16 [..., 2 W] for counters [..., W] (Salmon et al. 2011), as ``jax.random.bits`` makes them of a flat index."""
    shape = jnp.broadcast_shapes(high.shape, low.shape)
    counters = (jnp.broadcast_to(high, shape), jnp.broadcast_to(low, shape))
    keys = (jnp.broadcast_to(word, shape) for word in words)
    one, other = threefry2x32_p.bind(*keys, *counters)
    halves = lax.bitcast_convert_type(one ^ other, jnp.uint16)
    return halves.reshape(*shape[:-1], 2 * shape[-1])
