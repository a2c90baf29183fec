"""Random orders that are computed and not stored: a keyed bijection of the numbers below any size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

_ROUNDS = 8
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_SHIFT = np.uint64(33)
_GOLDEN = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1


def permuted(places: Int64[np.ndarray, " n"], size: int, key: tuple[int, ...]) -> Int64[np.ndarray, " n"]:
    """Where the numbers at some places of a random order of 0 .. size - 1 are: a bijection for each key.

    An unbalanced Feistel network over the bits of the numbers, walked again where it leads beyond ``size`` (Black and Rogaway 2002,
    Ciphers with Arbitrary Finite Domains); at most two walks on average.
    """
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    keys = _round_keys(key)
    found = _network(places.astype(np.uint64), low, bits - low, keys)
    while len(beyond := np.flatnonzero(found >= np.uint64(size))):
        found[beyond] = _network(found[beyond], low, bits - low, keys)
    return found.astype(np.int64)


def _network(values: np.ndarray, low: int, high: int, keys: list[np.uint64]) -> np.ndarray:
    shift, right, left = np.uint64(low), np.uint64((1 << low) - 1), np.uint64((1 << high) - 1)
    a, b = values >> shift, values & right
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        a = a ^ (_mixed(b ^ first) & left)
        b = b ^ (_mixed(a ^ second) & right)
    return (a << shift) | b


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3."""
    values = (values ^ (values >> _SHIFT)) * _MIX[0]
    values = (values ^ (values >> _SHIFT)) * _MIX[1]
    return values ^ (values >> _SHIFT)


def uniforms(key: tuple[int, ...]) -> Iterator[float]:
    """Numbers from 0 to 1, 1 excluded, without end, that follow from a key. For a few of each of very many keys: numpy's generators take
    longer to be made than these to be drawn."""
    state = 0
    for number in key:
        state = _finalised((state ^ number) + _GOLDEN & _ALL)
    while True:  # SplitMix64 (Steele et al. 2014), with that finaliser
        state = state + _GOLDEN & _ALL
        yield (_finalised(state) >> 11) * 2.0**-53


def _finalised(value: int) -> int:
    """The same as :func:`_mixed`, of one number."""
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & _ALL
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & _ALL
    return value ^ (value >> 33)


def _round_keys(key: tuple[int, ...]) -> list[np.uint64]:
    found, state = [], 0
    for number in (*key, *range(_ROUNDS)):
        state = ((state ^ number) * _GOLDEN + 0x632BE59BD9B4E019) & _ALL
        state = int(_mixed(np.array([state], np.uint64))[0])
        found.append(np.uint64(state))
    return found[len(key) :]
