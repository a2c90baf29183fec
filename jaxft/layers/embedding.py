"""Look-ups in a table of vectors, and the gradient of the table over many devices.

Dims: B batch, S length, D width, V rows of the table.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Integer

from jaxft.errors import UserError
from jaxft.layers.compute import Compute
from jaxft.layers.promotion import usual_promotion
from jaxft.parallel.sharding import AxisNames, AxisRules, run_mesh, ways

Array = jax.Array


def look_up(
    table: Float[Array, "V D"], ids: Integer[Array | np.ndarray, "*rows"], names: AxisNames, compute: Compute
) -> Float[Array, "*rows D"]:
    """Rows ``ids`` [B, S] or [S] of ``table`` [V, D], in ``compute.activation_dtype``.

    Ids beyond the table are refused where their values are known. In traced code, where they are not, such a place is NaN;
    under ``compute.known_ids`` they have been checked before, and the compiled program carries no select for it.

    Where the width is split over devices that have different tokens, the backward pass sends vectors' gradients around, each
    device taking its part of the width, if they are less than the table's: the compiler was seen to sum up all of that instead.

    Args:
      names: logical axes of the table.

    Raises:
      UserError: concrete ids that the table does not have.
    """
    _refuse_beyond(table.shape[0], ids, names)
    return _look_up(compute, names, compute.rules.place_gradient(table, *names), ids)


def _refuse_beyond(rows: int, ids: Array | np.ndarray, names: AxisNames) -> None:
    """Raises UserError if ids whose values are known are not rows of the table."""
    if isinstance(ids, jax.core.Tracer) or ids.size == 0 or not getattr(ids, "is_fully_addressable", True):
        return
    values = np.asarray(ids)
    wrong = values[(values < 0) | (values >= rows)]
    if wrong.size:
        kind = {"vocab": "token", "positions": "position", "types": "token type"}.get(str(names[0]), str(names[0]))
        raise UserError(f"{kind} {wrong[0]} is not in the table of {rows} rows: values run from 0 to {rows - 1}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(compute: Compute, names: AxisNames, table: Array, ids: Array | np.ndarray) -> Array:
    rows = jnp.take(table, ids, axis=0, mode="clip").astype(compute.activation_dtype)
    if compute.known_ids:
        return rows
    there = (ids >= 0) & (ids < table.shape[0])
    return jnp.where(there[..., None], rows, jnp.nan)


def _look_up_fwd(
    compute: Compute, names: AxisNames, table: Array, ids: Array
) -> tuple[Array, tuple[Array, np.ndarray]]:
    return _look_up(compute, names, table, ids), (ids, np.empty((table.shape[0], 0), table.dtype))


def _look_up_bwd(compute: Compute, names: AxisNames, kept: tuple[Array, np.ndarray], g: Array) -> tuple[Array, None]:
    ids, like = kept
    ids = jnp.clip(ids, 0, like.shape[0] - 1)

    def summed(g: Array, ids: Array) -> Array:
        return jnp.zeros((like.shape[0], g.shape[-1]), like.dtype).at[ids].add(g.astype(like.dtype))

    spec = _spec_by_width(compute.rules, names, g, ids, like)
    if spec is None:
        return summed(g, ids), None
    *tokens, width = spec
    apart = tuple(axis for entry in tokens if entry for axis in ((entry,) if isinstance(entry, str) else entry))

    def on_each_device(g: Array, ids: Array) -> Array:
        part = summed(g, ids).astype(compute.gradient_dtype or like.dtype)
        return jax.lax.psum(part, apart).astype(like.dtype)

    places = (spec, PartitionSpec(*tokens))
    mapped = jax.shard_map(on_each_device, in_specs=places, out_specs=PartitionSpec(None, width), check_vma=False)
    return mapped(g, ids), None


_look_up.defvjp(usual_promotion(_look_up_fwd), usual_promotion(_look_up_bwd))


def _spec_by_width(rules: AxisRules, names: AxisNames, g: Array, ids: Array, like: np.ndarray) -> PartitionSpec | None:
    """Where ``g`` [B, S, D] goes to be summed up: its width as the table's, tokens over the axes that are left. None: nowhere."""
    mesh, table = run_mesh(), dict(rules.table)
    if mesh is None or ids.shape != g.shape[:-1] or ids.ndim != 2 or names[0] is None or names[1] is None:
        return None
    parts = [ways(mesh, rules, name) for name in ("batch", "length")]
    if (
        ways(mesh, rules, names[1]) == 1
        or ways(mesh, rules, names[0]) > 1
        or g.shape[0] % parts[0]
        or g.shape[1] % parts[1]
    ):
        return None
    if ids.size / parts[0] / parts[1] * g.dtype.itemsize > like.shape[0] * like.dtype.itemsize:
        return None
    width = table[names[1]]
    tokens = (tuple(axis for axis in table[name] if axis not in width) for name in ("batch", "length"))
    return PartitionSpec(*(axes or None for axes in tokens), width)
