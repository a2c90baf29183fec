"""Cases of the test matrix: masks x padding x heads, with head sizes, lengths and types spread over them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.attention import MaskSpec, attend
from jaxft.attention.native.compiled import unavailable
from jaxft.layers import Compute

DIRECTIONS: dict[str, dict[str, Any]] = {
    "bidirectional": {},
    "causal": {"causal": True},
    "window": {"window": 7},
    "causal_window": {"causal": True, "window": 9},
}
HIDDEN = ("none", "padding", "segments")
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
SIZES = (32, 64, 80, 128)
LENGTHS = (48, 67)
TYPES = ("float32", "bfloat16")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(unavailable() is not None, reason=f"native {unavailable()}"))


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    direction: str
    hidden: str
    heads: str
    size: int
    length: int
    operands: str

    def __str__(self) -> str:
        return f"{self.direction}-{self.hidden}-{self.heads}-{self.size}-{self.length}-{self.operands}"

    @property
    def mask(self) -> MaskSpec:
        """Of two rows; one of them ends in padding, and one token of it is hidden in the middle."""
        rows, place = np.arange(2)[:, None], np.arange(self.length)[None]
        real = (place < self.length - 11 * rows) & ((place != 5) | (rows == 0))
        padding = segments = None
        if self.hidden == "padding":
            padding = jnp.asarray(real)
        if self.hidden == "segments":
            segments = jnp.asarray(np.where(real, 1 + (place > 17 + 3 * rows) + (place > 40), 0), jnp.int32)
        return MaskSpec(padding, segments, **DIRECTIONS[self.direction])

    @property
    def arrays(self) -> list[jax.Array]:
        """q, k, v and a cotangent, exact in the operand type."""
        n, k = HEADS[self.heads]
        rng = np.random.default_rng(self.length * self.size + n)
        shapes = [(2, h, self.length, self.size) for h in (n, k, k, n)]
        return [jnp.asarray(rng.standard_normal(s), self.operands).astype(jnp.float32) for s in shapes]


def all_cases() -> list[Case]:
    """Every combination."""
    return [Case(*x) for x in itertools.product(DIRECTIONS, HIDDEN, HEADS, SIZES, LENGTHS, TYPES)]


def few_cases() -> list[Case]:
    """Every combination of mask, padding and heads; head sizes, lengths and types take turns."""
    cells = itertools.product(DIRECTIONS, HIDDEN, HEADS)
    return [
        Case(*cell, SIZES[i % 4], LENGTHS[(i + i // 3) % 2], TYPES[(i + i // 4) % 2]) for i, cell in enumerate(cells)
    ]


def both_passes(
    case: Case, backend: str, platform: str = "cpu", bits: Any = "threefry", **options: Any
) -> list[np.ndarray]:
    """Output and gradients of q, k, v."""
    compute = Compute(attention=backend, matmul_dtype=case.operands, platform=platform, dropout_bits=bits)
    mask = case.mask

    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, compute, **options), q, k, v)
        return out, *vjp(g)

    return [np.asarray(x) for x in jax.jit(run)(*case.arrays)]
