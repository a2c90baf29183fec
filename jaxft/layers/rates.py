"""Rates of dropout: numbers that a program is compiled with, or arguments that it takes.

Whatever the rate, 16 random bits of an element are compared with a threshold, and what is kept is multiplied by one number. As
arguments, threshold and factor are the same numbers as those of the constant: so are the bits of results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

from jaxft.errors import UserError

Array = jax.Array

VALUES = 1 << 16
"""Values of 16 random bits."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class FixedRate:
    """A rate that is compiled in; a tree without leaves."""

    value: float

    @property
    def keep(self) -> int:
        """How many of the :data:`VALUES` keep an element."""
        return round((1.0 - self.value) * VALUES)

    @property
    def scale(self) -> np.float32:
        """What kept elements are multiplied by: of the rate that ``keep`` rounds to."""
        return np.float32(VALUES / self.keep)

    def keeps(self, bits: Shaped[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Which of these 16 bits (in integers that may be wider) keep their element."""
        return bits < self.keep


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RunTimeRate:
    """A rate that is an argument of the program. It stands in a family's Config where a number stands otherwise.

    To a program that is being traced, it is a rate above 0. Of rate 0, everything is kept and multiplied by 1.
    """

    keep: Int32[Array, ""]
    scale: Float32[Array, ""]

    def __gt__(self, other: float) -> bool:
        """Whether something may be dropped: ``rate > 0.0``."""
        if other != 0.0:
            raise TypeError(f"a rate of dropout that is an argument cannot be compared with {other}, but for 0.0")
        return True

    def __rsub__(self, other: object) -> NoReturn:
        """What dropout of someone else's begins with: ``1.0 - rate``."""
        raise UserError(
            f"{other} - rate: a model computes with a rate of dropout that is an argument of the step; give rates to "
            "jaxft.layers.dropout and jaxft.attention.attend (docs/add_a_model.md), or train each rate by itself"
        )

    def keeps(self, bits: Shaped[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Which of these 16 bits keep their element. A rate of 0 keeps all of :data:`VALUES`, which is no number of 16 bits."""
        return bits.astype(jnp.int32) < self.keep


Rate: TypeAlias = float | RunTimeRate


def known_rate(rate: Rate | FixedRate) -> FixedRate | RunTimeRate:
    """What knows the threshold and the factor of a rate."""
    return rate if isinstance(rate, FixedRate | RunTimeRate) else FixedRate(rate)


def run_time_rate(rate: float) -> RunTimeRate:
    """A rate as an argument."""
    fixed = FixedRate(rate)
    return RunTimeRate(jnp.asarray(fixed.keep, jnp.int32), jnp.asarray(fixed.scale))
