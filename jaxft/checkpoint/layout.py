"""Between trees of arrays and what Orbax writes: groups of nested dicts with string keys, one folder per group.

Only paths reach the disk, no class names of optax or of ours: ``opt_state/0/mu/embed/kernel``. The first part of a
path is the group (``params``, ``ema``, ``opt_state``); arrays outside of any (``step``) make up the group ``counters``.
Groups are why parameters can be read from a full state without touching the optimizer's, and without Orbax's partial
modes, which are silent about what is missing.

Orbax's v1 API, not v0: it can leave out compression (weights hardly compress, and zstd tripled the time to save), it is
one call per save without a manager that deletes steps in place, and groups ("checkpointables") are public API there.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxft.checkpoint.manifest import LeafSpec, Manifest
from jaxft.errors import UserError
from jaxft.files import JsonObject

Shaped = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""An array, or what is said of one."""

MARKER = "orbax.checkpoint"
"""A file that every folder written by Orbax has."""
COUNTERS = "counters"
_DATA_FILE_BYTES = 256 * 2**20
"""Several files instead of one are hashed in parallel."""
_SLICE_BYTES = 2**20
"""Least size of the part that each process writes of an array which several hold whole."""
_SHOWN = 4


def flatten(tree: PyTree[Shaped]) -> JsonObject:
    """Leaves by path, in the order of ``jax.tree.leaves``."""
    flat: JsonObject = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [_name(key) for key in keys]
        path = "/".join(names)
        if path in flat or any(not name or "/" in name for name in names):
            raise ValueError(f"tree path {names} cannot be stored: a name is empty, has a '/', or occurs twice")
        flat[path] = leaf
    return flat


def _name(key: object) -> str:
    for attribute in ("key", "name", "idx"):  # DictKey, GetAttrKey, SequenceKey
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"tree key {key!r} has no name")


def unflatten(flat: Mapping[str, object]) -> JsonObject:
    """Nested dicts from leaves by path."""
    tree: JsonObject = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = leaf
    return tree


def stored_path(path: str) -> str:
    """A path with its group in front."""
    return path if "/" in path else f"{COUNTERS}/{path}"


def specs_of(flat: Mapping[str, Shaped]) -> dict[str, LeafSpec]:
    """Shapes and dtypes by path."""
    for path, leaf in flat.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{path}: a checkpoint holds arrays, not {type(leaf).__name__}")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{path}: a typed PRNG key cannot be stored; store the seed")
    return {path: LeafSpec(tuple(leaf.shape), str(leaf.dtype)) for path, leaf in flat.items()}


def check_tree(folder: Path, stored: dict[str, LeafSpec], wanted: dict[str, LeafSpec]) -> None:
    """Refuses a checkpoint whose tree is not exactly the one wanted: Orbax would cast dtypes without a word.

    Raises:
      UserError: lists the first paths that differ.
    """
    differing = []
    for path in dict.fromkeys([*wanted, *stored]):
        if path not in stored:
            differing.append(f"{path}: not in the checkpoint, expected {wanted[path]}")
        elif path not in wanted:
            differing.append(f"{path}: {stored[path]} in the checkpoint, not expected")
        elif stored[path] != wanted[path]:
            differing.append(f"{path}: {stored[path]} in the checkpoint, expected {wanted[path]}")
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"{folder}: does not fit this configuration (use the model, optimizer and dtypes it was saved with): "
            f"{'; '.join(differing[:_SHOWN])}{more}"
        )


def subtree(manifest: Manifest, group: str) -> dict[str, LeafSpec]:
    """The part of the manifest's tree in one group, by paths inside it."""
    return {
        path.removeprefix(f"{group}/"): leaf for path, leaf in manifest.tree.items() if path.startswith(f"{group}/")
    }


def start_save(
    folder: Path, flat: Mapping[str, jax.Array | np.ndarray], *, keeps: bool = False
) -> ocp.AsyncResponse[None]:
    """Begins to write; when this returns, the caller may donate the arrays. ``result()`` waits for the commit.

    Args:
      keeps: the caller neither donates nor changes the arrays before the commit: on CPU none is copied then.
    """
    if any(path.startswith(f"{COUNTERS}/") for path in flat):
        raise ValueError(f"a state cannot have a subtree {COUNTERS!r}: the name is taken by the layout on disk")
    _quiet_orbax()
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
    # Shardings are always given at restore: those of the devices that happened to save are of no use, and Orbax cannot
    # read them on fewer devices (google/orbax#648).
    context.array.saving.enable_write_sharding_file = False
    # Nothing reads it: shapes and types are the manifest's.
    context.array.saving.array_metadata_store = None
    # Replicas write a part each, which a program per shape and part cuts off: where one process writes all, for nothing.
    context.array.saving.use_replica_parallel = jax.process_count() > 1
    context.array.saving.min_slice_bytes_for_replica_parallel = _SLICE_BYTES
    groups = unflatten({stored_path(path): leaf if keeps else _detach(leaf) for path, leaf in flat.items()})
    with context:
        return ocp.save_checkpointables_async(str(folder), groups)


def detach(flat: Mapping[str, jax.Array | np.ndarray]) -> tuple[dict[str, jax.Array | np.ndarray], bool]:
    """Arrays that the caller may donate without harm to what is written, and whether they can be written twice.

    On CPU these are copies of our own. Of other devices they are the caller's, which Orbax copies to the host before it returns.
    """
    owned = all(
        not isinstance(leaf, jax.Array) or all(device.platform == "cpu" for device in leaf.sharding.device_set)
        for leaf in flat.values()
    )
    return {path: _detach(leaf) for path, leaf in flat.items()}, owned and jax.process_count() == 1


def size_of(tree: Mapping[str, LeafSpec]) -> int:
    """Bytes of the arrays of a tree."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in tree.values())


def _detach(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """A copy where Orbax would make none: on CPU it writes out of the array's own buffer.

    That is safe, since XLA waits before it reuses a buffer that someone holds, but then the next training step, which
    wants the donated buffer, waits for the disk. From other devices, Orbax copies to the host before it returns.
    """
    if isinstance(leaf, jax.Array) and all(device.platform == "cpu" for device in leaf.sharding.device_set):
        return jax.device_put(leaf, leaf.sharding, may_alias=False)  # jnp.copy would compile a program per shape
    return leaf


def load(folder: Path, like: Mapping[str, Shaped]) -> dict[str, jax.Array | np.ndarray]:
    """Arrays by path as ``like`` says: on its shardings, or in numpy where it has numpy arrays.

    Groups that ``like`` does not name are not read. The caller has compared shapes and dtypes.
    """
    abstract = unflatten({stored_path(path): _abstract(path, leaf) for path, leaf in like.items()})
    with ocp.Context():  # not whatever context the caller may be in
        loaded = flatten(ocp.load_checkpointables(str(folder), abstract))
    arrays = {path: loaded[stored_path(path)] for path in like}
    found, wanted = specs_of(arrays), specs_of(like)
    if len(loaded) != len(like) or found != wanted:
        raise RuntimeError(f"{folder}: Orbax returned another tree than was asked for")
    return arrays


def load_one(folder: Path, path: str, like: np.ndarray, others: Collection[str]) -> np.ndarray:
    """One array of a group, in numpy.

    Args:
      like: an array of its shape and dtype.
      others: the paths of the group's other arrays, which are not read.
    """
    asked = dict.fromkeys(others, ocp.PLACEHOLDER) | {path: like}
    with ocp.Context():
        loaded = ocp.load_checkpointables(str(folder), unflatten(asked))
    found: Any = loaded
    for name in path.split("/"):
        found = found[name]
    if specs_of({path: found}) != specs_of({path: like}):
        raise RuntimeError(f"{folder}: Orbax returned another array than was asked for")
    return found


def _abstract(path: str, leaf: Shaped) -> np.ndarray | jax.ShapeDtypeStruct:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        raise ValueError(f"{path}: restoring needs an explicit sharding for every array")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class _RaisedAnyway(logging.Filter):
    """Drops the tracebacks (four per failed save, 150 lines) that Orbax logs of an error that it also raises to us."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised an exception" not in str(record.msg)


@functools.cache
def _quiet_orbax() -> None:
    logging.getLogger("absl").addFilter(_RaisedAnyway())
