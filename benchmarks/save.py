"""What a checkpoint costs: the part of a save that holds training up, and the whole of it beside a plain write of the same bytes.

Saves a random training state (parameters and two moments of AdamW, float32) again and again, in turns with a plain write and fsync of
the same bytes to the same disk; medians. A save hashes every byte, seals, and syncs files and folders.

    python benchmarks/save.py [--parameters 22.7e6] [--turns 7] [--folder .] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reported import Rows, report

from jaxft.checkpoint import Checkpoints
from jaxft.checkpoint.apart import Parts

_WIDTH = 1024
_LEAVES = 24


class _Nowhere:
    """Parts that stay where they are: what is put into a bucket takes the network's time, not the disk's."""

    def put(self, step: Path, written: Path, names: object) -> None: ...
    def holds(self, step: Path, names: object) -> None: ...
    def fetch_parts(self, step: Path, names: object) -> None: ...


def _state(parameters: int) -> dict[str, Any]:
    rng, rows = np.random.default_rng(0), max(1, parameters // _WIDTH // _LEAVES)

    def tree() -> dict[str, jax.Array]:
        return {f"w{i}": jax.device_put(rng.normal(size=(rows, _WIDTH)).astype(np.float32)) for i in range(_LEAVES)}

    return {"params": tree(), "opt_state": {"mu": tree(), "nu": tree()}}


def _written(folder: Path, arrays: list[np.ndarray]) -> float:
    began = time.perf_counter()
    with open(folder / "plain", "wb") as file:
        for array in arrays:
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())
    spent = time.perf_counter() - began
    (folder / "plain").unlink()
    return spent


def _saved(store: Checkpoints, step: int, state: dict[str, Any]) -> tuple[float, float]:
    """Seconds until the call returns, and until the step is stored."""
    began = time.perf_counter()
    store.save(step, state, {})
    returned = time.perf_counter() - began
    store.wait()
    return returned, time.perf_counter() - began


def compare(options: argparse.Namespace) -> Rows:
    state = _state(int(options.parameters))
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    size = sum(array.nbytes for array in arrays)
    rows: Rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        parts: Parts = _Nowhere()
        stores = {
            "step, as Orbax writes it": Checkpoints(folder / "shared", keep=1),
            "part of a step": Checkpoints(folder / "apart", keep=1, parts=parts),
        }
        plain: list[float] = []
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in stores}
        for turn in range(options.turns + 1):
            times = {name: _saved(store, turn, state) for name, store in stores.items()}
            spent = _written(folder, arrays)
            if turn:  # the first one makes folders and threads
                plain.append(spent)
                for name, pair in times.items():
                    found[name].append(pair)
        for store in stores.values():
            store.close()
    raw = statistics.median(plain)
    rows.append(
        {"what": "plain write and fsync", "MB": size / 1e6, "seconds": raw, "holds up": raw, "times plain": 1.0}
    )
    for name, pairs in found.items():
        held, whole = (statistics.median(one) for one in zip(*pairs, strict=True))
        rows.append({"what": name, "MB": size / 1e6, "seconds": whole, "holds up": held, "times plain": whole / raw})
    return rows


def _text(rows: Rows) -> str:
    lines = [f"{'':28} {'MB':>8} {'seconds':>9} {'x plain':>8} {'holds training up':>20}"]
    for row in rows:
        held = (
            ""
            if row["times plain"] == 1
            else f"{row['holds up'] * 1e3:9.1f} ms {row['holds up'] / row['seconds']:7.1%}"
        )
        lines.append(f"{row['what']:28} {row['MB']:8.0f} {row['seconds']:9.2f} {row['times plain']:7.2f}x {held:>20}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=22.7e6, help="of the model (MiniLM-L6)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", default=".", help="on the disk that is measured")
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    parsed.run = f"{parsed.parameters:g} parameters"
    report(parsed, ("jax", "orbax-checkpoint", "numpy"), compare, _text)
