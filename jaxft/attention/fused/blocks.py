"""How a call of the fused kernels is cut into steps, and what a step sees of its arrays. See :mod:`jaxft.attention.fused`.

Dims: B batch, S query and key length, N query heads, K key/value heads, G = N/K, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import pallas as pl

from jaxft.layers import FixedRate

Array = jax.Array

LANES = 128
# Sizes found by pricing; all of them are flat around these values.
_TOKENS = 512  # of all rows of a step
_QUERIES = 256  # queries at a time; without dropout, half of longer rows
# Logits written out as straight code, for the compiler to interleave; 2**20: 5 % less time, 4x the compiling.
_UNROLLED = 2**18
_STEP_BYTES = 24 * 2**20  # of operands and results of a step, double-buffered


@dataclass(frozen=True)
class Spec:
    """The static part of a call."""

    scale: float
    """What q k^T is multiplied by."""
    causal: bool = False
    window: int | None = None
    """Keys are seen that are fewer than so many places away."""
    soft_cap: float | None = None
    rate: float | None = 0.0
    """Dropout probability; None: an argument."""
    row_length: int = 0
    """Length of the rows that dropout counts places in; lengths of operands may have been filled up."""
    interpret: bool = False
    """Run as ordinary jax operations, on any platform."""

    @property
    def drops(self) -> bool:
        """Whether there is dropout."""
        return self.rate is None or self.rate > 0.0

    @property
    def fixed_rate(self) -> FixedRate:
        """The rate, where it is no argument."""
        return FixedRate(self.rate or 0.0)

    def keys_of(self, first: int, count: int, length: int) -> slice:
        """Whole registers of keys that some of ``count`` queries may see, by distance and direction."""
        reach = length if self.window is None else self.window - 1
        low = max(first - reach, 0)
        high = min(first + count + (0 if self.causal else reach), length)
        return slice(low // LANES * LANES, -(-high // LANES) * LANES)


class Dims(NamedTuple):
    """B, N, K, S and H of a call."""

    rows: int
    heads: int
    key_heads: int
    length: int
    size: int


_Index = tuple[Array, Array, slice] | tuple[Array, Array]
"""Row and head, and which part of the length; without it, the whole."""


@dataclass(frozen=True)
class Block:
    """What a step of the grid sees of an array of heads: [heads H, rows S], or, one number a query, [heads, 1, rows S]."""

    ref: jax.Ref
    size: int
    """H."""
    length: int
    """S."""

    def _at(self, index: _Index) -> tuple[Array | slice | pl.Slice, ...]:
        """The index of part of a row of a head, (row, head, slice), or of the whole, (row, head)."""
        row, head, cut = index if len(index) == 3 else (*index, slice(0, self.length))
        lanes = pl.ds(pl.multiple_of(row * self.length + cut.start, LANES), cut.stop - cut.start)
        if len(self.ref.shape) == 3:
            return head, slice(None), lanes
        return pl.ds(pl.multiple_of(head * self.size, 8), self.size), lanes

    def __getitem__(self, index: _Index) -> Array:
        return self.ref[self._at(index)]

    def __setitem__(self, index: _Index, value: Array) -> None:
        self.ref[self._at(index)] = value

    @property
    def dtype(self) -> np.dtype:
        """Element type of the array."""
        return self.ref.dtype


@dataclass(frozen=True)
class Sizes:
    """How the work is cut. One step of the grid takes ``rows`` rows and ``heads`` key heads of each."""

    rows: int
    heads: int
    block: int
    """Queries at a time."""
    unroll: int
    """Key heads at a time."""

    @classmethod
    def of(cls, spec: Spec, dims: Dims, itemsize: int) -> Sizes:
        """For operands of ``itemsize`` bytes."""
        b, n, kv, s, h = dims
        group = n // kv
        of_head = 2 * (4 * group + 4) * h * s * itemsize
        heads = _divisor(kv, _STEP_BYTES // of_head)
        rows = _divisor(b, min(_TOKENS // s, _STEP_BYTES // (of_head * kv))) if heads == kv else 1
        most = _QUERIES if spec.drops else max(_QUERIES, s // 2)
        if spec.causal or spec.window is not None:  # to skip what none of a block may see
            most = s // 4
        block = LANES * _divisor(s // LANES, most // LANES)
        unroll = min(12, _UNROLLED // (group * s * s))
        return cls(rows, heads, block, _divisor(rows * heads, unroll))


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to ``most``, at least 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(most, 1))
