"""Attention on each device's own rows and heads, for backends that XLA cannot split by itself.

Dims: B batch, S query length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.parallel.sharding import AxisRules, run_mesh

Array = jax.Array
QUERY_NAMES = ("batch", "act_heads", "length", None)
KEY_NAMES = ("batch", "act_kv_heads", "length", None)


def split_alike(rules: AxisRules) -> bool:
    """Whether query and key heads are split over the same axes: then each device has the keys of its own queries."""
    return rules.spec(QUERY_NAMES)[1] == rules.spec(KEY_NAMES)[1]


def split_evenly(rules: AxisRules, q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether each device gets as many rows and heads as any other."""
    mesh = run_mesh()
    if mesh is None:
        return True
    pairs = [(q.shape, rules.spec(QUERY_NAMES)), (k.shape, rules.spec(KEY_NAMES))]
    return all(
        size % math.prod(mesh.shape[axis] for axis in _axes(entry)) == 0
        for shape, spec in pairs
        for size, entry in zip(shape, spec, strict=True)
    )


def heads_split(rules: AxisRules) -> int:
    """Ways in which query heads are split over the current mesh."""
    mesh = run_mesh()
    if mesh is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in _axes(rules.spec(QUERY_NAMES)[1]))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one dimension of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def specs_of(rules: AxisRules, mask: MaskSpec, drop: Dropout | None) -> dict[str, PyTree[PartitionSpec]]:
    """Where the arguments of a backend lie."""
    query, key = rules.spec(QUERY_NAMES), rules.spec(KEY_NAMES)
    row = rules.spec(("batch", "length"))
    places = jax.tree.map(lambda leaf: row if leaf.ndim == 2 else PartitionSpec(*row[:1]), mask)
    specs = {"q": query, "k": key, "v": key, "mask": places, "drop": None}
    if drop is not None:
        leaves, tree = jax.tree.flatten(drop)
        heads = PartitionSpec(*query[:2])
        specs["drop"] = jax.tree.unflatten(tree, [heads if leaf.ndim == 2 else PartitionSpec() for leaf in leaves])
    return specs


def on_each_device(
    rules: AxisRules,
    local: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    mask: MaskSpec,
    drop: Dropout | None,
) -> Array:
    """``local(q, k, v, mask, drop)`` [B, N, S, H] of each device's part; heads split alike."""
    if run_mesh() is None:
        return local(q, k, v, mask, drop)
    specs = specs_of(rules, mask, drop)
    names = ("q", "k", "v", "mask", "drop")
    mapped = jax.shard_map(local, in_specs=tuple(specs[name] for name in names), out_specs=specs["q"], check_vma=False)
    return mapped(q, k, v, mask, drop)
