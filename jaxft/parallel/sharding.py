"""From logical axis names to placements on a device mesh.

Parameters and activations carry *logical* names ("embed", "heads", "batch", ...). One small table, :class:`AxisRules`, says
which mesh axes a name is split over. Changing the mesh changes nothing else.

Rules travel as a static field of modules, never as a context: a context is not part of jit's cache key, so a second set of
rules would silently reuse the first one's compiled function.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxft.config import MeshConfig
from jaxft.errors import UserError, nearest

MESH_AXES = ("slice", "data", "fsdp", "context", "tensor")
"""From the slowest links to the fastest: slices are joined by the data-centre network, the rest by the chips' own."""

CONTEXT = "context"

AxisNames = tuple[str | None, ...]
"""One logical name per dimension; None is never split. ``layers:1``: layers from number 1 on, split as ``layers`` are."""

# Parameter width ("embed") and activation width ("act_embed") have different names: that is what makes FSDP expressible.
DEFAULT_TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("slice", "data", "fsdp")),
    ("length", ("context",)),
    ("predicted", ()),
    ("target", ()),
    ("texts", ()),
    ("height", ()),
    ("width", ()),
    ("channels", ()),
    ("frames", ()),
    ("bins", ()),
    ("act_embed", ()),
    ("act_heads", ("tensor",)),
    ("act_kv_heads", ("tensor",)),
    ("act_mlp", ("tensor",)),
    ("act_vocab", ("tensor",)),
    ("layers", ()),
    ("embed", ("fsdp", "context")),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("pooled", ()),
    ("positions", ()),
    ("types", ()),
    ("channels", ()),
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
            row = name.partition(":")[0]
            if row not in rules:
                raise UserError(f"{where}: unknown logical axis {name!r}: {nearest(name, rules)}")
            for axis in rules[row]:
                if axis in taken:
                    raise UserError(
                        f"{where} {names}: mesh axis {axis!r} is used by both {taken[axis]!r} and {name!r}; change the rules"
                    )
                taken[axis] = name
            entries.append(rules[row] or None)
        return PartitionSpec(*entries)

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """``x`` placed as its logical names say; unchanged where no mesh of a run is set (one device, a mesh of one's own)."""
        if run_mesh() is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.spec(names, "activation"))

    def place_gradient(self, x: jax.Array, *names: str | None) -> jax.Array:
        """``x``; its gradient is placed as its logical names say, where it is made.

        Placed only at the end, the sum over devices of a weight's gradient was seen to be made whole on each of them first.
        """
        return _place_gradient(self, names, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _place_gradient(rules: AxisRules, names: AxisNames, x: jax.Array) -> jax.Array:
    return x


_place_gradient.defvjp(lambda rules, names, x: (x, None), lambda rules, names, kept, g: (rules.constrain(g, *names),))

DEFAULT_RULES = AxisRules()


def make_rules(config: MeshConfig) -> AxisRules:
    """The default table with the rows that ``mesh.rules`` replaces.

    Raises:
      UserError: a name that no tensor has, or an axis that no mesh has.
    """
    table = dict(DEFAULT_TABLE)
    for name, axes in config.rules.items():
        if name not in table:
            raise UserError(f"mesh.rules.{name}: unknown logical axis: {nearest(name, table)}")
        for axis in axes:
            if axis not in MESH_AXES:
                raise UserError(f"mesh.rules.{name}: unknown mesh axis {axis!r}: {nearest(axis, MESH_AXES)}")
        table[name] = tuple(axes)
    return AxisRules(tuple(table.items()))


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh of a run, of axes ``MESH_AXES``, in an order that respects the topology.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or ``slices`` is not the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, types = _sizes(config, len(devices)), _axis_types(config)
    # axis_types is explicit because jax's own default differs between make_mesh and Mesh.
    slices = _slices(devices, sizes[0])
    if len(slices) == 1:
        return _laid_out(sizes, types, devices)
    shape = (1, *sizes[1:])
    parts = [_laid_out(shape, types, part).devices for part in slices]
    return Mesh(np.concatenate(parts), MESH_AXES, axis_types=types)


def _laid_out(sizes: tuple[int, ...], types: tuple[AxisType, ...], devices: list[jax.Device] | None) -> Mesh:
    """A mesh whose axes follow the links between the devices.

    Raises:
      UserError: jax finds no way to lay axes of these sizes along the links of a TPU.
    """
    try:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        shown = " x ".join(
            f"{_KEY_OF_AXIS.get(name, name)}={n}" for name, n in zip(MESH_AXES, sizes, strict=True) if n > 1
        )
        raise UserError(
            f"mesh {shown}: jax finds no way to lay these axes along the links of the devices; choose sizes that are products of the "
            "sides of their torus"
        ) from error


def make_abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """The mesh of ``count`` devices that are not there."""
    return AbstractMesh(_sizes(config, count), MESH_AXES, axis_types=_axis_types(config))


def _axis_types(config: MeshConfig) -> tuple[AxisType, ...]:
    return (AxisType.Explicit if config.axes == "explicit" else AxisType.Auto,) * len(MESH_AXES)


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Sizes of the ``MESH_AXES`` for ``count`` devices."""
    sizes = dict(zip(MESH_AXES, (config.slices, config.data, config.fsdp, config.context, config.tensor), strict=True))
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: only one size may be -1, found {' and '.join(free)}")
    if count % fixed or (not free and fixed != count):
        shown = " x ".join(f"{_KEY_OF_AXIS.get(name, name)}={size}" for name, size in sizes.items() if size != 1)
        raise UserError(f"mesh {shown or 'data=1'} does not fit {count} devices; set one size to -1 or change a factor")
    if free:
        sizes[free[0]] = count // fixed
    return tuple(sizes.values())


_KEY_OF_AXIS = {"slice": "slices"}


def _slices(devices: list[jax.Device], wanted: int) -> list[list[jax.Device]]:
    """The devices of each slice; where the hardware knows of none, neighbours in order of processes are taken for one."""
    numbers = [getattr(device, "slice_index", None) or 0 for device in devices]
    there = sorted(set(numbers))
    if len(there) == 1:
        size = len(devices) // wanted
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id)) if wanted > 1 else devices
        return [ordered[i * size : (i + 1) * size] for i in range(wanted)]
    if len(there) != wanted:
        raise UserError(
            f"mesh.slices={wanted}, but the devices are of {len(there)} slices; set mesh.slices={len(there)}"
        )
    return [[device for device, number in zip(devices, numbers, strict=True) if number == one] for one in there]


def run_mesh() -> AbstractMesh | None:
    """The current mesh, if it is a run's: more than one device, axes ``MESH_AXES``, all of them left to the compiler.

    None under any other: in their own loop, people have meshes of other axes, explicit ones, and code that runs on each device
    (``shard_map``, ``pmap``). There arrays stay where they are, and placing them is up to whoever made the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.axis_names) != set(MESH_AXES):
        return None
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def ways(mesh: Mesh | AbstractMesh, rules: AxisRules, name: str) -> int:
    """Into how many parts a dimension of this logical name is split."""
    return int(np.prod([mesh.shape[axis] for axis in dict(rules.table)[name.partition(":")[0]]]))


def jitted(
    function: Callable[..., object], mesh: Mesh, out_shardings: PyTree, donate_argnums: int | tuple[int, ...] = ()
) -> jax.stages.Wrapped:
    """``jax.jit`` for either kind of axes: on an Explicit mesh, the inside of ``function`` is left to the compiler too."""
    if AxisType.Explicit in mesh.axis_types:
        function = jax.sharding.auto_axes(function, out_sharding=out_shardings)
    return jax.jit(function, out_shardings=out_shardings, donate_argnums=donate_argnums)


def device_kind(mesh: Mesh | AbstractMesh) -> str | None:
    """Kind of the mesh's devices, as jax names it; None for a mesh without devices."""
    return mesh.devices.flat[0].device_kind if isinstance(mesh, Mesh) else None


def no_mesh() -> AbstractContextManager[object]:
    """Inside, nothing is constrained: the mesh that a caller has set is out of sight."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


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
                f"choose a mesh size that divides {size}, or leave it whole: mesh.rules.{(name or '').partition(':')[0]}=[]"
            )
    return NamedSharding(mesh, spec)


def shardings_of(mesh: Mesh, rules: AxisRules, shapes: PyTree, axes: PyTree[AxisNames]) -> PyTree[NamedSharding]:
    """A tree of shardings for a tree of shaped leaves and its tree of logical names."""

    def of_leaf(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct, names: AxisNames) -> NamedSharding:
        return sharding_of(mesh, rules, leaf.shape, names, path_text(path))

    return jax.tree_util.tree_map_with_path(of_leaf, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: AxisRules, axes: Sequence[str | int]) -> NamedSharding:
    """Where an array of a batch lies.

    Args:
      axes: a logical name per dimension; a number is a fixed size, which is not split.
    """
    return NamedSharding(mesh, rules.spec(tuple(None if isinstance(a, int) else a for a in axes), "batch"))


LARGE = 16 * 2**20
"""Bytes from which a parameter that no axis splits is refused."""


def check_split(
    mesh: Mesh, rules: AxisRules, shapes: PyTree, axes: PyTree[AxisNames], allowed: tuple[str, ...] = ()
) -> None:
    """Refuses a mesh that is meant to split parameters and leaves a large one whole on every device.

    Args:
      allowed: glob patterns over parameter paths that may be (``mesh.replicate``).

    Raises:
      UserError: names the parameter, its size and what to do.
    """
    kinds = {axis for name in _PARAMETER_NAMES for axis in dict(rules.table)[name] if mesh.shape[axis] > 1}
    if not kinds:
        return  # plain data parallelism: whole parameters are what was asked for
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        where, nbytes = path_text(path), leaf.size * leaf.dtype.itemsize
        names = functools.reduce(lambda tree, key: tree[key.key], path, axes)
        if nbytes < LARGE or any(fnmatch.fnmatchcase(where, pattern) for pattern in allowed):
            continue
        if all(ways(mesh, rules, name) == 1 for name in names if name is not None):
            raise UserError(
                f"{where} {names}: {nbytes / 2**20:.0f} MiB would lie whole on each of {mesh.size} devices, though mesh axes "
                f"{sorted(kinds)} split parameters; change mesh.rules, or allow it: mesh.replicate=[{where}]"
            )


# Logical names that only parameters have.
_PARAMETER_NAMES = (
    "layers",
    "embed",
    "heads",
    "kv_heads",
    "mlp",
    "vocab",
    "pooled",
    "positions",
    "types",
    "channels",
    "classes",
)


def path_text(path: tuple[object, ...]) -> str:
    """A key path of a tree as ``a/b/c``."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def shard_bytes(shapes: PyTree, shardings: PyTree[NamedSharding]) -> int:
    """Bytes that one device holds of a tree."""
    sizes = jax.tree.map(
        lambda leaf, place: int(np.prod(place.shard_shape(leaf.shape))) * leaf.dtype.itemsize, shapes, shardings
    )
    return sum(jax.tree.leaves(sizes))


def whole_bytes(shapes: PyTree, shardings: PyTree[NamedSharding]) -> int:
    """Bytes of the leaves that no axis splits."""
    sizes = jax.tree.map(
        lambda leaf, place: leaf.size * leaf.dtype.itemsize if place.shard_shape(leaf.shape) == leaf.shape else 0,
        shapes,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
