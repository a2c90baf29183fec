"""Every model family on this machine's accelerator: what each of its heads gives, and gradients, against the same on the CPU.

    python benchmarks/accelerator_families.py --json FILE

A family's tiny model, with each head that it has, fresh weights and ragged rows; float32, the attention that `auto` chooses on either
side. Printed and written: the relative error (2-norm) of what the head gives and of the gradients of all parameters together.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

# Nothing is timed here: making programs fast, or trying kernels out, would take most of the minutes.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
).strip()

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import models
from jaxft.files import write_atomic
from jaxft.layers import Compute
from jaxft.models.example import example_batch
from jaxft.models.initial import init_params
from jaxft.trees import paths_of

BOUND = 2e-5
"""Of the relative error."""
REHEARSED = {"bert": (None, "classification"), "mpnet": (None,)}


def cases(rehearse: bool) -> Iterator[tuple[str, str | None]]:
    """Families and heads."""
    for name in models.families():
        for head in models.family(name).HEADS:
            if not rehearse or head in REHEARSED.get(name, ()):
                yield name, head


def computed(name: str, head: str | None, device: jax.Device) -> tuple[np.ndarray, np.ndarray]:
    """What a head gives (the bare encoder its vectors) and all gradients of a sum over it, on a device."""
    family = models.family(name)
    model = family.Model(family.TINY, head, Compute("float32", "float32", platform=device.platform))
    batch = {key: jnp.asarray(value) for key, value in example_batch(family.facts(family.TINY), 4).items()}

    def both(params: Any) -> Any:
        def summed(params: Any) -> Any:
            output = model.apply({"params": params}, **batch)
            found = output.hidden if output.logits is None else output.logits
            real = batch["mask"].reshape(batch["mask"].shape + (1,) * (found.ndim - 2)) if found.ndim > 2 else 1.0
            return jnp.sum(jnp.sin(3.0 * found) * real), found * real

        grads, found = jax.grad(summed, has_aux=True)(params)
        return found, jnp.concatenate([leaf.ravel() for leaf in paths_of(grads).values()])

    with jax.default_device(jax.devices("cpu")[0]):  # the same weights on both sides
        params = init_params(model, 0)
    params, batch = jax.device_put((params, batch), device)
    found, grads = jax.jit(both)(params)
    return np.asarray(found, np.float32), np.asarray(grads, np.float32)


def compare(name: str, head: str | None) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"family": name, "head": head}
    try:
        there, here = (computed(name, head, device) for device in (jax.devices()[0], jax.devices("cpu")[0]))
    except Exception as error:  # noqa: BLE001 - a family that does not compile is a finding, not the end
        return row | {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    for part, a, b in zip(("values", "gradients"), there, here, strict=True):
        error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
        row[part] = error if np.isfinite(error) else float("inf")
    return row


def text_of(row: dict[str, Any]) -> str:
    """One line."""
    who = f"{row['family']:14}{row['head'] or 'encoder':24}"
    if "failed" in row:
        return f"{who}FAILED ({row['failed']})"
    wrong = "" if max(row["values"], row["gradients"]) <= BOUND else "  WRONG"
    return f"{who}values {row['values']:.1e}, gradients {row['gradients']:.1e}{wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write what was found here, after every head")
    parser.add_argument("--workers", type=int, default=6, help="processes that share the heads (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="few heads, on the CPU")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"on {jax.devices()[0].device_kind}, bound {BOUND}", flush=True)
    # Processes: most of the time goes into tracing, of which a process does one at a time.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1 if options.rehearse else options.workers, fresh) as pool:
        for done in as_completed([pool.submit(compare, *case) for case in cases(options.rehearse)]):
            rows.append(done.result())
            print(text_of(rows[-1]), flush=True)
            if options.json:
                tree = {"device": jax.devices()[0].device_kind, "bound": BOUND, "rows": rows}
                write_atomic(Path(options.json), json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
