"""States saved on one mesh and restored on another, all pairs: the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .course import Course
from .report import Report

_MESHES = {"1": (1, 1), "2": (1, 2), "4": (1, 4), "8": (1, 8), "2x4": (2, 4), "4x2": (4, 2)}
"""(fsdp, tensor): parameters are split by both."""


def run(course: Course, count: int, seed: int) -> Report:
    """All pairs, or as many of them."""
    report = Report("meshes")
    pairs = [(one, other) for one in _MESHES for other in _MESHES]
    for one, other in pairs[:count]:
        report.count("pair", _moved(course.folder / f"mesh-{one}-{other}", one, other, seed))
    return report


def _moved(folder: Path, one: str, other: str, seed: int) -> str | None:
    import jax

    from jaxft.checkpoint import Checkpoints

    saved, like = _state(one, seed), _state(other, seed + 1)
    with Checkpoints(folder, keep=1) as store:
        store.save(1, saved, {})
        store.wait()
        found = store.restore(jax.tree.map(_shaped, like)).state
    for name, wanted, there, placed in zip(
        sorted(saved["params"]),
        *(jax.tree.leaves(tree) for tree in (saved["params"], found["params"], like["params"])),
        strict=True,
    ):
        if np.asarray(wanted).tobytes() != np.asarray(there).tobytes():
            return f"{one} to {other}: {name} has other bits"
        if there.sharding != placed.sharding:
            return f"{one} to {other}: {name} lies otherwise than asked"
    return None


def _shaped(leaf: object) -> object:
    import jax

    assert isinstance(leaf, jax.Array)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _state(mesh: str, seed: int) -> dict[str, dict[str, object]]:
    """Random arrays of several types, split over a mesh of that name, some whole."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    shape = _MESHES[mesh]
    devices = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("fsdp", "tensor"))
    rng, params = np.random.default_rng(seed), {}
    for dtype in ("float32", "bfloat16", "int32"):
        for spec in ((), ("fsdp",), (None, "tensor"), ("fsdp", "tensor")):
            values = (rng.normal(size=(16, 24)) * 100).astype(dtype)
            params[f"{dtype} {spec}"] = jax.device_put(values, NamedSharding(devices, PartitionSpec(*spec)))
    return {"params": params}
