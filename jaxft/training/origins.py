"""Which operation each number that is not finite came from.

Beside an array that holds NaN or infinity goes another of whole numbers, its *origins*: for each element the number of the
operation that first gave something not finite from finite inputs, and 0 where the element is finite. Operations hand them on:
element by element where they compute or move elements one by one, by rows where they reduce, else the first origin of all inputs
for all outputs. So what was not finite but was selected away, as the logarithm of 0 in a branch that is not taken, has no part in
what is found at the end.

Infinities that depend on nothing that is computed with (a mask's minus infinity) are *meant*: their origins are negative, and
remain so until they become NaN. The operation that makes NaN of them is an origin of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

_NAMES = """
abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos cosh digamma div erf
erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p logistic max min mul name neg nextafter optimization_barrier pow
reduce_precision rem round rsqrt sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh
"""
_ELEMENTWISE = frozenset(_NAMES.split())
"""Primitives of which an element of the output comes from the elements in the same place alone."""
_MOVES = {
    **dict.fromkeys(
        ["broadcast_in_dim", "reshape", "rev", "slice", "squeeze", "expand_dims", "transpose"], slice(0, 1)
    ),
    **dict.fromkeys(["dynamic_slice", "gather"], slice(0, 1)),
    **dict.fromkeys(["dynamic_update_slice", "pad"], slice(0, 2)),
    "concatenate": slice(None),
    "select_n": slice(1, None),
}
"""Primitives that only move elements, and which of their inputs hold these."""
_REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod"])
_NONE = np.iinfo(np.int32).max


class Value(NamedTuple):
    """An array under way."""

    array: jax.Array
    origins: np.ndarray | None = None
    """int32, of the array's shape; None: everything is finite."""
    constant: bool = False
    """Whether it depends on no argument."""


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def finite(array: jax.Array) -> bool:
    """Whether an array holds neither NaN nor infinity; integers and keys never do."""
    return not jnp.issubdtype(array.dtype, jnp.inexact) or bool(_all_finite(array))


def handed_on(eqn: JaxprEqn, place: int, out: np.ndarray, inputs: Sequence[Value]) -> np.ndarray:
    """The origins of an output as far as they are its inputs': int32 like ``out``, 0 where there is none.

    Args:
      place: which output it is.
    """
    if all(value.origins is None for value in inputs):
        return np.zeros(out.shape, np.int32)
    name = eqn.primitive.name
    if name in _MOVES:
        return _moved(eqn, inputs)
    if name == "optimization_barrier":
        inputs = inputs[place : place + 1]
    if name in _ELEMENTWISE:
        return _elementwise(out, inputs)
    if name in _REDUCTIONS and inputs[0].origins is not None:
        return _first(inputs[0].origins, tuple(eqn.params["axes"]))
    return _of_all(out, inputs)


def _moved(eqn: JaxprEqn, inputs: Sequence[Value]) -> np.ndarray:
    chosen = range(len(inputs))[_MOVES[eqn.primitive.name]]
    given = [
        _origins(value) if number in chosen else value.array for number, value in enumerate(inputs)
    ]  # fmt: skip
    params = dict(eqn.params)
    if "fill_value" in params:
        params["fill_value"] = 0  # what is put in place of elements that are not there comes from this operation
    return np.array(eqn.primitive.bind(*given, **params))


def _elementwise(out: np.ndarray, inputs: Sequence[Value]) -> np.ndarray:
    origins = np.stack([np.broadcast_to(_origins(value), out.shape) for value in inputs])
    is_nan = np.stack([np.broadcast_to(_is_nan(value), out.shape) for value in inputs])
    of_nan = _first(np.where(is_nan, origins, 0), 0)
    return np.where(np.isnan(out) & (of_nan != 0), of_nan, _first(origins, 0))


def _of_all(out: np.ndarray, inputs: Sequence[Value]) -> np.ndarray:
    origins = [_origins(value).ravel() for value in inputs]
    of_nan = [each[_is_nan(value).ravel()] for each, value in zip(origins, inputs, strict=True)]
    whole = [np.concatenate([*some, np.zeros(1, np.int32)]) for some in (of_nan, origins)]
    nan, found = (_first(each, 0) for each in whole)
    return np.where(np.isnan(out) & (nan != 0), nan, found).astype(np.int32)


def _origins(value: Value) -> np.ndarray:
    return np.zeros(value.array.shape, np.int32) if value.origins is None else value.origins


def _is_nan(value: Value) -> np.ndarray:
    if value.origins is None:
        return np.zeros(value.array.shape, bool)
    return np.isnan(np.asarray(value.array))


def _first(origins: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The lowest positive number along some axes; where there is none, a negative one if there is any, else 0."""
    lowest = np.where(origins > 0, origins, _NONE).min(axis, initial=_NONE)
    return np.where(lowest == _NONE, origins.min(axis, initial=0), lowest).astype(np.int32)


def shown(eqn: JaxprEqn, place: tuple[int, ...], inputs: Sequence[Value], out: np.ndarray) -> str:
    """An operation with its numbers, where it computes element by element: ``log(-1.0) = nan``."""
    name = eqn.primitive.name
    if name not in _ELEMENTWISE:
        sizes = [float(np.abs(np.asarray(v.array, np.float64)).max()) for v in inputs if _is_float(v) and v.array.size]
        most = f" of numbers up to {max(sizes):.3g}" if sizes and np.isfinite(max(sizes)) else ""
        return f"{name}{most} gave {out[place]}"
    given = [np.broadcast_to(np.asarray(v.array), out.shape)[place] for v in inputs if _is_float(v)]
    more = f", {eqn.params['y']}" if name == "integer_pow" else ""
    return f"{name}({', '.join(f'{float(x):.3g}' for x in given)}{more}) = {out[place]}"


def _is_float(value: Value) -> bool:
    return jnp.issubdtype(value.array.dtype, jnp.floating)
