"""The weight-conversion engine: one table of rules per family, run forwards to import and backwards to export.

A rule says where one of our parameters lives in the reference's checkpoint and how it is rearranged (an einops pattern,
theirs -> ours). Names with ``{layer}`` stand for one tensor per layer; ours is their stack. Conversion is strict: missing,
unused and mis-shaped tensors are collected and raised together.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from einops import rearrange

from jaxft.errors import UserError
from jaxft.weights import TensorOut, Weights

_THREADS = 2  # reading overlaps with rearranging; more threads hold more tensors in memory at once
_SHOWN = 4  # names of each kind in an error message


@dataclass(frozen=True)
class Rule:
    """One of our parameters and its place in the reference's checkpoint."""

    ours: str
    """Path in our tree, for instance ``layers/mlp/up/kernel``."""
    theirs: str
    """Tensor name in models with a head; ``{layer}`` stands for 0, 1, ..."""
    pattern: str | None = None
    """einops pattern of one tensor, theirs -> ours; None: as it is."""
    copies: tuple[str, ...] = ()
    """Names under which the reference stores the same tensor again; written on export, read where the first is missing."""


@dataclass(frozen=True)
class Layout:
    """How a family's tensors are named in checkpoint files."""

    rules: tuple[Rule, ...]
    prefix: str
    """Of the encoder inside models with a head; absent in files of the bare encoder."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(ending found in old files, ending in the rules)."""
    leftovers: tuple[str, ...] = ()
    """Patterns of tensors that may be there unused."""
    fresh: tuple[str, ...] = ()
    """Patterns of our paths that may be missing and are then initialised."""


@dataclass(frozen=True)
class Imported:
    """Parameters read from a checkpoint."""

    params: dict[str, Any]
    """Nested dict of jax arrays; lacks what is in ``fresh``."""
    fresh: tuple[str, ...]
    """Our paths that the checkpoint does not have."""
    unused: tuple[str, ...]
    """Known leftovers: their names that were not read."""


def paths_of(tree: Any) -> dict[str, Any]:
    """A nested dict as {path: leaf}, levels joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`paths_of`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


# ------------------------------------------------------------------------------------------------------------ import


def file_names(weights: Weights, layout: Layout) -> dict[str, str]:
    """Each tensor's name as rules spell it -> its name in the file (prefix added, old endings renewed)."""
    names = weights.names()
    bare = not any(name.startswith(layout.prefix) for name in names)
    # Of a bare encoder all names lack the prefix, those of heads included: a head never stands beside a bare encoder.
    heads = {rule.theirs.split(".")[0] for rule in layout.rules if not rule.theirs.startswith(layout.prefix)}
    found = {}
    for name in names:
        canonical = name
        for old, new in layout.aliases:
            if name.endswith(old):
                canonical = name.removesuffix(old) + new
        if bare and canonical.split(".")[0] not in heads:
            canonical = layout.prefix + canonical
        found[canonical] = name
    return found


def import_params(
    weights: Weights,
    layout: Layout,
    shapes: dict[str, Any],
    place: Callable[[str], jax.sharding.Sharding | None],
    dtype: Any,
) -> Imported:
    """Reads a checkpoint, tensor by tensor, into (sharded) arrays.

    Args:
      weights: the open checkpoint.
      layout: the family's names.
      shapes: our parameter tree, of shaped leaves.
      place: our path -> sharding, None for the default device.
      dtype: of the result.

    Raises:
      UserError: missing, unused or mis-shaped tensors, all together.
    """
    ours = paths_of(shapes)
    names = file_names(weights, layout)
    by_path = {rule.ours: rule for rule in layout.rules}
    if set(by_path) != set(ours):
        raise ValueError(f"rules and parameters differ: {sorted(set(by_path) ^ set(ours))}")

    problems = _Problems([], [], [])
    fresh, sources, concerned = [], {}, set[str]()
    for path, rule in by_path.items():
        theirs = _names_of(rule, ours[path].shape)
        if theirs[0] not in names:
            theirs = next(([copy] for copy in rule.copies if copy in names), theirs)
        concerned.update(names[name] for name in theirs if name in names)
        absent = [name for name in theirs if name not in names]
        if absent:
            if len(absent) == len(theirs) and _matches(path, layout.fresh):
                fresh.append(path)
            else:
                problems.missing.extend(absent)
            continue
        expected = _their_shape(rule, ours[path].shape)
        for name in theirs:
            actual = weights.shape(names[name])
            if actual != expected:
                problems.misshaped.append(f"{names[name]} is {list(actual)}, expected {list(expected)}")
        sources[path] = [names[name] for name in theirs]

    known = {names[copy] for rule in layout.rules for copy in rule.copies if copy in names}
    left = [(canonical, name) for canonical, name in names.items() if name not in concerned and name not in known]
    unused = [name for canonical, name in left if _matches(canonical, layout.leftovers)]
    problems.unused.extend(name for _, name in left if name not in unused)
    problems.raise_if_any(weights)

    def load(path: str) -> jax.Array:
        return _load(weights, by_path[path], sources[path], ours[path].shape, place(path), dtype)

    with ThreadPoolExecutor(_THREADS) as pool:
        arrays = dict(zip(sources, pool.map(load, sources), strict=True))
    return Imported(nested(arrays), tuple(fresh), tuple(unused))


@dataclass
class _Problems:
    missing: list[str]
    unused: list[str]
    misshaped: list[str]

    def raise_if_any(self, weights: Weights) -> None:
        kinds = [("missing", self.missing), ("unused", self.unused), ("mis-shaped", self.misshaped)]
        parts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]
        if parts:
            raise UserError(f"{weights.path}: weights do not fit the model: {'; '.join(parts)}")


def _some(names: Sequence[str]) -> str:
    more = f", ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _stacked(rule: Rule) -> bool:
    return "{layer}" in rule.theirs


def _names_of(rule: Rule, shape: tuple[int, ...]) -> list[str]:
    if not _stacked(rule):
        return [rule.theirs]
    return [rule.theirs.format(layer=layer) for layer in range(shape[0])]


def _their_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    one = shape[1:] if _stacked(rule) else shape
    if rule.pattern is None:
        return one
    sizes = _sizes(rule.pattern, one)
    groups = rule.pattern.split("->")[0].replace("(", " ( ").replace(")", " ) ").split()
    dims: list[int] = []
    grouped = False
    for token in groups:
        if token == "(":
            dims.append(1)
            grouped = True
        elif token == ")":
            grouped = False
        elif grouped:
            dims[-1] *= sizes[token]
        else:
            dims.append(sizes[token])
    return tuple(dims)


def _sizes(pattern: str, ours: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(pattern.split("->")[1].split(), ours, strict=True))


def _rearranged(rule: Rule, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if rule.pattern is None:
        return tensor
    grouped = (
        set(rule.pattern[rule.pattern.find("(") + 1 : rule.pattern.find(")")].split()) if "(" in rule.pattern else set()
    )
    sizes = {name: size for name, size in _sizes(rule.pattern, shape).items() if name in grouped}
    return rearrange(tensor, rule.pattern, **sizes)


def _load(
    weights: Weights, rule: Rule, names: list[str], shape: tuple[int, ...], sharding: Any, dtype: Any
) -> jax.Array:
    """One parameter: each tensor is read once and copied into the part of each device of this process."""
    stacked = _stacked(rule)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if sharding is None else sharding
    indices: dict[Any, Any] = dict(sharding.addressable_devices_indices_map(shape))
    parts: dict[Any, np.ndarray] = {}
    keys = {device: _index_key(index, shape) for device, index in indices.items()}
    for device, index in indices.items():
        if keys[device] not in parts:
            parts[keys[device]] = _aligned_empty(
                tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)), dtype
            )
    for layer, name in enumerate(names):
        tensor = _rearranged(rule, weights.read(name), shape[1:] if stacked else shape)
        for key, part in parts.items():
            index = tuple(slice(start, stop) for start, stop in key)
            if not stacked:
                np.copyto(part, tensor[index], casting="unsafe")
            elif index[0].start <= layer < index[0].stop:
                np.copyto(part[layer - index[0].start], tensor[index[1:]], casting="unsafe")
    arrays = [jax.device_put(parts[keys[device]], device) for device in indices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _index_key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that XLA's CPU backend takes over without a copy: it wants 64-byte alignment."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ export


def export_tensors(params: dict[str, Any], layout: Layout, *, bare: bool, dtype: Any = None) -> list[TensorOut]:
    """The reference's tensors, in table order, each made when it is read.

    Args:
      params: our tree.
      layout: the family's names.
      bare: leave out the encoder's prefix (a model without a head).
      dtype: of the result; None: as stored.

    Raises:
      ValueError: rules and parameters differ.
    """
    flat = paths_of(params)
    if {rule.ours for rule in layout.rules} != set(flat):
        raise ValueError(f"rules and parameters differ: {sorted({rule.ours for rule in layout.rules} ^ set(flat))}")
    return [out for rule in layout.rules for out in _exported(rule, flat[rule.ours], layout, bare, dtype)]


def _exported(rule: Rule, leaf: Any, layout: Layout, bare: bool, dtype: Any) -> Iterator[TensorOut]:
    shape = _their_shape(rule, leaf.shape)
    kind = np.dtype(leaf.dtype if dtype is None else dtype)

    def reader(layer: int | None) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            ours = np.asarray(leaf if layer is None else leaf[layer])
            if rule.pattern is not None:
                left, right = rule.pattern.split("->")
                sizes = _sizes(rule.pattern, ours.shape)
                ours = rearrange(ours, f"{right.strip()} -> {left.strip()}", **sizes)
            return np.ascontiguousarray(ours.astype(kind, copy=False))

        return read

    for layer, name in enumerate(_names_of(rule, leaf.shape)):
        for copy in (name, *rule.copies):
            written = copy.removeprefix(layout.prefix) if bare else copy
            yield TensorOut(written, shape, kind, reader(layer if _stacked(rule) else None))
