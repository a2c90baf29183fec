"""Random bits of dropout as a hash of counters: a few integer operations an element, computed where they are used.

A threefry array costs some hundred operations a word and, as a loop of its own, memory for the whole array. Here a bit is
a function of a key and of the place of its element alone, so that any block of a mask can be made again anywhere: in a
fusion, in a kernel, on any mesh, in the backward pass.

The place is two counters, the key two words. The words and ``high`` (the row: few of them) are mixed thoroughly to two row
words a and b, which start and cross a Weyl sequence with the finaliser ``lowbias32`` on it::

    x = low * GOLDEN + a;  x ^= x >> 16;  x *= M1;  x ^= (x >> 15) ^ b;  x *= M2;  x ^= x >> 16

With a alone, rows would meet: two of n positions share words, moved along, with probability 2 * n / 2**32. That is certain
with some thousand rows, and b makes such rows differ. It is xored, as a word added before a multiply is a constant added after
it. Without the Weyl sequence the first steps do little to counters below 2**16, and what is left is measurably uneven.

Weyl sequence and finaliser are the scheme of SplitMix (Steele, Lea and Flood 2014). ``lowbias32`` (Chris Wellons, "Prospecting
for Hash Functions", https://nullprogram.com/blog/2018/07/31/, public domain) is the 32-bit permutation that his search found to
change each bit of its result most nearly half the time, whichever bit of its argument changes. This is no cryptography, and the
2**32 words of a row are a permutation: none comes twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Key, UInt32

from jaxft.layers.rates import FixedRate, Rate, known_rate

Array = jax.Array

GOLDEN = np.uint32(0x9E3779B9)  # 2**32 / golden ratio: multiples of it are spread evenly, and it is odd
_M1, _M2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)  # of lowbias32, as are the shifts
_15, _16 = np.uint32(15), np.uint32(16)


def _lowbias32(x: Array) -> Array:
    x = (x ^ (x >> _16)) * _M1
    x = (x ^ (x >> _15)) * _M2
    return x ^ (x >> _16)


def hash_words(key: Key[Array, "*keys"]) -> tuple[UInt32[Array, "*keys"], UInt32[Array, "*keys"]]:
    """Two uint32 words from a key (or an array of keys) of any kind.

    A bijection of threefry keys: different keys give different pairs. Keys of four words (``rbg``, ``unsafe_rbg``) are taken in two
    at a time, the second two on top of what the first have given.
    """
    data = jax.random.key_data(key)
    first = _lowbias32(data[..., 0] ^ GOLDEN)  # off 0, which lowbias32 leaves as it is
    second = _lowbias32(data[..., 1] + first)
    first = _lowbias32(first ^ second)
    for i in range(2, data.shape[-1], 2):
        first = _lowbias32(data[..., i] ^ first)
        second = _lowbias32(data[..., i + 1] + first + second)
        first = _lowbias32(first ^ second)
    return first, second


def row_words(words: tuple[Array, Array], high: Array) -> tuple[Array, Array]:
    """The words a and b of a row: different for different rows of a key, and for different keys at a row."""
    first, second = words
    a = _lowbias32(_lowbias32(high ^ first) ^ second)
    return a, _lowbias32(a + first)


def mix(start: Array, b: Array) -> Array:
    """The steps after ``start`` = low * GOLDEN + a, but for the last one: that leaves the upper 16 bits alone.

    A kernel may multiply the parts of ``low`` instead: (s * T + t) * GOLDEN = s * (T * GOLDEN) + t * GOLDEN, modulo 2**32.
    """
    x = (start ^ (start >> _16)) * _M1
    return (x ^ (x >> _15) ^ b) * _M2


def hash_bits(words: tuple[Array, Array], high: Array, low: Array) -> Array:
    """Random uint32 bits for the counters ``high`` and ``low`` (uint32, broadcast against each other).

    Args:
      words: from :func:`hash_words`.
      high: the row, such as batch * heads + head; costs 27 operations for each of its own elements.
      low: the position in the row, such as s * T + t; costs 11 operations for each element of the result.
    """
    a, b = row_words(words, high)
    x = mix(low * GOLDEN + a, b)
    return x ^ (x >> _16)


def keep_at(
    words: tuple[UInt32[Array, "*_"], UInt32[Array, "*_"]],
    rate: Rate | FixedRate,
    high: UInt32[Array, "*_"],
    low: UInt32[Array, "*_"],
) -> tuple[Bool[Array, "*_"], np.float32 | Float32[Array, ""]]:
    """What dropout at ``rate`` keeps at these counters (bool), and the scale of what is kept.

    Keeps where the upper 16 bits of :func:`hash_bits` are below a threshold: the rate is exact to 2**-17, the scale matches it.
    """
    known = known_rate(rate)
    a, b = row_words(words, high)
    upper = (mix(low * GOLDEN + a, b) >> _16).astype(jnp.int32)  # signed: vector units may lack the unsigned compare
    return known.keeps(upper), known.scale
