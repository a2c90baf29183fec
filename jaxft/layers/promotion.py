"""jax's usual rules of promotion, whatever a user has set: ``jax_numpy_rank_promotion=raise`` and
``jax_numpy_dtype_promotion=strict`` are there to find mistakes in one's own code, and ours relies on the usual ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def usual_promotion(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, in which ranks and types are promoted as jax does by default.

    Both passes of a function with a gradient of its own need it: jax traces them later, outside of what called them.
    """

    @functools.wraps(function)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **named)

    return wrapped
