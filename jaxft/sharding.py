"""From logical axis names to placements on a device mesh.

Parameters and activations carry *logical* names ("embed", "heads", "batch", ...). One small table, :class:`AxisRules`, says
which mesh axes a name is split over. Changing the mesh changes nothing else.

Rules travel as a static field of modules, never as a context: a context is not part of jit's cache key, so a second set of
rules would silently reuse the first one's compiled function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft.config import MeshConfig
from jaxft.errors import UserError, nearest

AxisNames = tuple[str | None, ...]
"""One logical name per dimension; None is never split."""

# Parameter width ("embed") and activation width ("act_embed") have different names: that is what makes FSDP expressible.
DEFAULT_TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", ()),
    ("act_embed", ()),
    ("act_heads", ("tensor",)),
    ("act_kv_heads", ("tensor",)),
    ("act_mlp", ("tensor",)),
    ("act_vocab", ("tensor",)),
    ("layers", ()),
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("pooled", ()),
    ("positions", ()),
    ("types", ()),
    ("classes", ()),
    ("norm", ()),
)


@dataclass(frozen=True)
class AxisRules:
    """An immutable, hashable table: logical name -> mesh axes."""

    table: tuple[tuple[str, tuple[str, ...]], ...] = DEFAULT_TABLE

    def spec(self, names: AxisNames, where: str = "array") -> PartitionSpec:
        """The PartitionSpec of a tensor with these logical names.

        Raises:
          UserError: an unknown name, or one mesh axis used by two dimensions.
        """
        rules: Mapping[str, tuple[str, ...]] = dict(self.table)
        taken: dict[str, str] = {}
        entries: list[tuple[str, ...] | None] = []
        for name in names:
            if name is None:
                entries.append(None)
                continue
            if name not in rules:
                raise UserError(f"{where}: unknown logical axis {name!r}: {nearest(name, rules)}")
            for axis in rules[name]:
                if axis in taken:
                    raise UserError(
                        f"{where} {names}: mesh axis {axis!r} is used by both {taken[axis]!r} and {name!r}; change the rules"
                    )
                taken[axis] = name
            entries.append(rules[name] or None)
        return PartitionSpec(*entries)

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """``x`` placed as its logical names say; unchanged where no mesh is set (one device, notebooks)."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.spec(names, "activation"))


DEFAULT_RULES = AxisRules()


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh of a run, in an order that respects the topology.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: only one size may be -1, found {' and '.join(free)}")
    if len(devices) % fixed or (not free and fixed != len(devices)):
        shown = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"mesh {shown} does not fit {len(devices)} devices; set one size to -1 or change a factor")
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    # axis_types is explicit because jax's own default differs between make_mesh and Mesh.
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def sharding_of(mesh: Mesh, rules: AxisRules, shape: tuple[int, ...], names: AxisNames, where: str) -> NamedSharding:
    """The sharding of one tensor.

    Raises:
      UserError: a dimension is not divisible by the mesh axes it is split over; names the tensor, dimension, sizes and a fix.
    """
    spec = rules.spec(names, where)
    for size, name, entry in zip(shape, names, spec, strict=True):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())  # PartitionSpec unwraps tuples of one
        split = int(np.prod([mesh.shape[axis] for axis in axes]))
        if size % split:
            raise UserError(
                f"{where}: dimension {name!r} of size {size} cannot be split {split} ways over mesh axes {axes}; "
                f"choose a mesh size that divides {size}"
            )
    return NamedSharding(mesh, spec)


def shardings_of(mesh: Mesh, rules: AxisRules, shapes: Any, axes: Any) -> Any:
    """A tree of shardings for a tree of shaped leaves and its tree of logical names."""

    def of_leaf(path: tuple[Any, ...], leaf: Any, names: AxisNames) -> NamedSharding:
        where = "/".join(str(getattr(key, "key", key)) for key in path)
        return sharding_of(mesh, rules, leaf.shape, names, where)

    return jax.tree_util.tree_map_with_path(of_leaf, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """Leading dimension split over the batch axes, the rest whole."""
    return NamedSharding(mesh, rules.spec(("batch",), "batch"))
