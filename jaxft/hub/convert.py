"""The weight-conversion engine: one table of rules per family, run forwards to import and backwards to export.

A rule says where one of our parameters lives in the reference's checkpoint and how it is rearranged (an einops pattern,
theirs -> ours). Names with ``{layer}`` stand for one tensor per layer; ours is their stack. A tensor that holds several of ours
is split on import, each part read by itself, and fused again on export. Conversion is strict: missing, unused and mis-shaped
tensors are collected and raised together.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxft.errors import UserError
from jaxft.hub.stored import Source, Stored, StoredParam, load_param
from jaxft.hub.weights import TensorOut, Weights
from jaxft.hub.weights.numbers import copy_rounded, is_float
from jaxft.models.layout import Layout, Rule, same_numbers
from jaxft.trees import Params, Shapes, Tree, nested, paths_of

Exported = Array | np.ndarray | StoredParam
"""A parameter that can be written: on devices, on the host, or in an open checkpoint."""

_THREADS = 2  # reading overlaps with rearranging; more threads hold more tensors in memory at once
_SHOWN = 4  # names of each kind in an error message


Leaf = TypeVar("Leaf")


@dataclass(frozen=True)
class Imported(Generic[Leaf]):
    """Parameters read from a checkpoint."""

    params: Tree[Leaf]
    """Nested dict of jax arrays, or of :class:`StoredParam`; lacks what is in ``fresh``."""
    fresh: tuple[str, ...]
    """Our paths that the checkpoint does not have."""
    unused: tuple[str, ...]
    """Known leftovers: their names that were not read."""
    substituted: tuple[tuple[str, str], ...] = ()
    """(name that the reference looks for, name that was read in its place)."""
    non_finite: list[str] = field(default_factory=list)
    """Names of tensors that hold NaN or infinity, as far as they have been read."""


# ------------------------------------------------------------------------------------------------------------ import


def file_names(weights: Weights, layout: Layout) -> dict[str, str]:
    """Each tensor's name as rules spell it -> its name in the file (prefix added, old endings renewed).

    Raises:
      UserError: a tensor is there under its old and its new name, with different numbers.
    """
    names = {name: layout.spelt(name) for name in weights.names()}
    bare = not any(name.startswith(layout.prefix) for name in names.values())
    # Of a bare encoder all names lack the prefix, those of heads included: a head never stands beside a bare encoder.
    heads = {rule.theirs.split(".")[0] for rule in layout.rules if not rule.theirs.startswith(layout.prefix)}
    found: dict[str, str] = {}
    for name, spelt in names.items():
        canonical = spelt
        for old, new in layout.aliases:
            if name.endswith(old):
                canonical = name.removesuffix(old) + new
        if bare and canonical.split(".")[0] not in heads:
            canonical = layout.prefix + canonical
        if canonical in found and not same_numbers(weights, found[canonical], name):
            raise UserError(
                f"{weights.path}: {found[canonical]} and {name} are an old and a new name of one tensor, but differ; remove one"
            )
        found[canonical] = name
    return found


def import_params(
    weights: Weights,
    layout: Layout,
    shapes: Shapes,
    place: Callable[[str], jax.sharding.Sharding | None],
    dtype: DTypeLike,
) -> Imported[Array]:
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
    plan = _plan(weights, layout, ours)
    non_finite: list[str] = []

    config: Any = jax.config
    device = config.jax_default_device  # of the caller's thread

    def load(path: str) -> jax.Array:
        with jax.default_device(device):
            return load_param(Stored(weights, plan.sources[path], ours[path].shape, non_finite), place(path), dtype)

    with ThreadPoolExecutor(_THREADS) as pool:
        arrays = dict(zip(plan.sources, pool.map(load, plan.sources), strict=True))
    return Imported(nested(arrays), plan.fresh, plan.unused, plan.substituted, sorted(non_finite))


def stored_params(weights: Weights, layout: Layout, shapes: Shapes) -> Imported[StoredParam]:
    """The parameters of a checkpoint as they are stored, each tensor read when it is asked for.

    Args:
      weights: the checkpoint, open as long as the parameters are used.
      layout: the family's names.
      shapes: our parameter tree, of shaped leaves.

    Raises:
      UserError: missing, unused or mis-shaped tensors, all together.
    """
    ours = paths_of(shapes)
    plan = _plan(weights, layout, ours)
    non_finite: list[str] = []
    params = {
        path: StoredParam(Stored(weights, source, ours[path].shape, non_finite))
        for path, source in plan.sources.items()
    }
    return Imported(nested(params), plan.fresh, plan.unused, plan.substituted, non_finite)


@dataclass(frozen=True)
class _Plan:
    """Which tensors make up which parameters."""

    sources: Mapping[str, Source]
    """By our path."""
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    substituted: tuple[tuple[str, str], ...]


def _plan(weights: Weights, layout: Layout, ours: Mapping[str, jax.ShapeDtypeStruct]) -> _Plan:
    names = file_names(weights, layout)
    _check_paths(layout, ours)
    problems = _Problems([], [], [], [])
    absent: dict[tuple[str, ...], list[str]] = {}
    sources: dict[str, Source] = {}
    substituted, concerned = [], set[str]()
    for rule in (one for listed in layout.rules for one in listed.as_stored(names)):
        shapes = [ours[path].shape for path in rule.paths]
        there = next((name for name in rule.names() if name in names), rule.theirs)
        theirs = rule.of_layers(there, shapes[0][0] if rule.stacked else 1)
        lacking = [name for name in theirs if name not in names]
        concerned.update(names[name] for name in theirs if name in names)
        if lacking:
            absent[rule.paths] = lacking
            continue
        other = there in rule.preferred and rule.theirs in names
        if there in (*rule.copies, *rule.spares) or (
            other and not same_numbers(weights, names[there], names[rule.theirs])
        ):
            substituted.append((rule.theirs, there))
        found = [names[name] for name in theirs]
        expected, places = rule.parts([rule.one(shape) for shape in shapes])
        for i, path in enumerate(rule.paths):
            sources[path] = Source(rule, found, places[i] if len(rule.paths) > 1 else None)
        for name in found:
            problems.look_at(name, weights, rule.in_file(expected))
    fresh = [path for paths in absent for path in paths if all(_is_fresh(one, sources, layout) for one in paths)]
    problems.missing.extend(name for paths, lacking in absent.items() if paths[0] not in fresh for name in lacking)

    known = {names[name] for rule in layout.rules for name in rule.names() if name in names}
    left = [(canonical, name) for canonical, name in names.items() if name not in concerned | known]
    unused = [name for canonical, name in left if _matches(canonical, layout.leftovers)]
    problems.unused.extend(name for _, name in left if name not in unused)
    problems.raise_if_any(weights)
    return _Plan(sources, tuple(fresh), tuple(unused), tuple(substituted))


def _check_paths(layout: Layout, ours: Mapping[str, object]) -> None:
    paths = [path for rule in layout.rules for path in rule.paths]
    if set(paths) != set(ours):
        raise ValueError(f"rules and parameters differ: {sorted(set(paths) ^ set(ours))}")


def _is_fresh(path: str, sources: Mapping[str, object], layout: Layout) -> bool:
    """Whether a missing parameter may be initialised: one of a head of which nothing is there."""
    part = path.split("/")[0] + "/"
    return _matches(path, layout.fresh) and not any(other.startswith(part) for other in sources)


@dataclass
class _Problems:
    missing: list[str]
    unused: list[str]
    misshaped: list[str]
    quantised: list[str]

    def look_at(self, name: str, weights: Weights, expected: tuple[int, ...]) -> None:
        actual, dtype = weights.shape(name), weights.dtype(name)
        if actual != expected:
            self.misshaped.append(f"{name} is {list(actual)}, expected {list(expected)}")
        if not is_float(dtype):
            self.quantised.append(f"{name} is {dtype}")

    def raise_if_any(self, weights: Weights) -> None:
        kinds = [("missing", self.missing), ("unused", self.unused), ("mis-shaped", self.misshaped)]
        kinds += [("not floating-point (quantised weights are not read)", self.quantised)]
        parts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]
        if parts:
            raise UserError(f"{weights.path}: weights do not fit the model: {'; '.join(parts)}")


def _some(names: Sequence[str]) -> str:
    more = f", ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# ------------------------------------------------------------------------------------------------------------ export


def export_tensors(
    params: Params | Tree[Exported], layout: Layout, *, bare: bool, dtype: DTypeLike | None = None
) -> list[TensorOut]:
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
    _check_paths(layout, flat)
    return [
        out
        for rule in layout.rules
        for out in _exported(rule, [flat[path] for path in rule.paths], layout, bare, dtype)
    ]


def _exported(
    rule: Rule, leaves: Sequence[Exported], layout: Layout, bare: bool, dtype: DTypeLike | None
) -> Iterator[TensorOut]:
    shape, places = rule.parts([rule.one(leaf.shape) for leaf in leaves])
    names = rule.of_layers(rule.theirs, leaves[0].shape[0] if rule.stacked else 1)

    def reader(name: str, layer: int, kind: np.dtype) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            parts = [_as_theirs(rule, leaf[layer] if rule.stacked else leaf) for leaf in leaves]
            if len(parts) == 1 and parts[0].dtype == kind:
                return np.ascontiguousarray(parts[0].T if rule.turned else parts[0])
            made = np.empty(shape, kind)
            for i, part in enumerate(parts):
                copy_rounded(made[slice(*places[i])] if len(parts) > 1 else made, part, name, "export")
            return np.ascontiguousarray(made.T) if rule.turned else made

        return read

    for layer, name in enumerate(names):
        kind = np.dtype(_stored_type(leaves, layer) if dtype is None else dtype)
        for copy in (name, *rule.copies):
            written = copy.removeprefix(layout.prefix) if bare else copy
            yield TensorOut(written, rule.in_file(shape), kind, reader(written, layer, kind))


def _as_theirs(rule: Rule, ours: Array | np.ndarray | StoredParam) -> np.ndarray:
    whole = np.asarray(ours)
    return rule.arrangement(whole.ndim).to_theirs(whole)


def _stored_type(leaves: Sequence[Exported], layer: int) -> np.dtype:
    """The type of a tensor in the file: the least that holds all of ours that it is made of."""
    kinds = [leaf.dtypes[layer] if isinstance(leaf, StoredParam) else leaf.dtype for leaf in leaves]
    return functools.reduce(jnp.promote_types, kinds)
