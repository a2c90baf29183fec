"""States saved by some processes and restored by others, 1, 2 and 4: the same bits, in a folder that all see and in folders of their own.

python tests/faults/counts.py save|check FOLDER apart|shared SEED      # one of the processes, which its variables place
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if __package__ in (None, ""):  # started as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "faults"

from .course import Course, environment, places
from .report import Report

if TYPE_CHECKING:  # the child processes import it
    import jax

_COUNTS = (1, 2, 4)
_DTYPES = ("float32", "bfloat16", "int32")
_STEP = 3


def run(course: Course, count: int, seed: int) -> Report:
    """All pairs both ways, or as many of them."""
    report = Report("counts")
    ways = [(one, other, way) for way in ("apart", "shared") for one in _COUNTS for other in _COUNTS]
    for one, other, way in ways[:count]:
        folder = course.folder / f"count-{way}-{one}-{other}"
        problem = _all(folder, "save", one, way, seed) or _all(folder, "check", other, way, seed)
        report.count(f"{way} pair", None if problem is None else f"{one} to {other}: {problem}")
    return report


def _all(folder: Path, what: str, count: int, way: str, seed: int) -> str | None:
    """Starts as many processes; what one of them says is wrong."""
    running = [
        subprocess.Popen(
            [sys.executable, __file__, what, str(folder), way, str(seed)],
            env=environment() | place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for place in places(count)
    ]  # fmt: skip
    said = [one.communicate(timeout=180)[0] for one in running]
    return next(
        (text.strip().splitlines()[-1] for one, text in zip(running, said, strict=True) if one.returncode), None
    )


class _Beside:
    """A folder that all see in the place of a bucket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, step: Path, written: Path, names: object) -> None:
        for name in _texts(names):
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(written / name, self._folder / name)

    def fetch_parts(self, step: Path, names: object) -> None:
        for name in _texts(names):
            (step / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._folder / name, step / name)

    def holds(self, step: Path, names: object) -> None:
        """Nothing is deleted here."""


def _texts(names: object) -> list[str]:
    assert isinstance(names, list | set | dict)
    return [str(name) for name in names]


def _process(what: str, folder: Path, way: str, seed: int) -> str | None:
    """What is wrong in this process."""
    import jax

    from jaxft.checkpoint import Checkpoints
    from jaxft.machine import processes

    processes.start(print)
    mine, bucket = folder / "shared", folder / "bucket"
    parts = _Beside(bucket) if way == "apart" else None
    if parts is not None:
        mine = folder / f"{what}-{jax.process_index()}"
        if what == "check":  # every host fetches the seals at the start
            (mine / str(_STEP)).mkdir(parents=True)
            shutil.copyfile(bucket / "jaxft.json", mine / str(_STEP) / "jaxft.json")

    def stored() -> None:
        if parts is not None:
            shutil.copyfile(mine / str(_STEP) / "jaxft.json", bucket / "jaxft.json")

    state = _state(seed if what == "save" else seed + 1)
    with Checkpoints(mine, keep=1, stored=stored, parts=parts) as store:
        if what == "save":
            store.save(_STEP, state, {})
            return None
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        found = store.restore(like).state["params"]
    for name, leaf in _state(seed)["params"].items():
        for one, other in zip(leaf.addressable_shards, found[name].addressable_shards, strict=True):
            if np.asarray(one.data).tobytes() != np.asarray(other.data).tobytes():
                return f"{name} has other bits"
    return None


def _state(seed: int) -> dict[str, dict[str, jax.Array]]:
    """Random arrays of several types, split over all processes along one axis or another, some whole."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh, rng, params = Mesh(np.array(jax.devices()), ("fsdp",)), np.random.default_rng(seed), {}
    for dtype in _DTYPES:
        for spec in ((), ("fsdp",), (None, "fsdp")):
            values = (rng.normal(size=(16, 24)) * 100).astype(dtype)
            placed = NamedSharding(mesh, PartitionSpec(*spec))
            params[f"{dtype} {spec}"] = jax.make_array_from_callback(values.shape, placed, values.__getitem__)
    return {"params": params}


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    wrong = _process(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    if wrong is not None:
        sys.exit(wrong)
