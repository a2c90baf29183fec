"""Where the time of a train step goes on this machine's accelerator: kernels by kind, and the dearest of them.

    python benchmarks/accelerator_profile.py --size large --rows 32 --length 512 [--json FILE]

The step is that of `benchmarks/step.py`, traced by jax's own profiler. Printed: milliseconds a step in matrix products, attention
kernels, copies and transposes, and everything else; what the device spends between kernels; then the dearest kernels with the
operation of the compiled program that each belongs to.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from step import jaxft_step, parser_of

from jaxft.files import write_atomic

KINDS = {
    "attention": ("fmha", "flash", "sdpa", "cudnn"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "dot"),
    "copies": ("transpose", "copy", "memcpy", "memset", "concatenate", "slice"),
}
"""Parts of kernels' names, the first kind that matches counts; everything else is `element-wise`."""
STEPS = 3
SHOWN = 25


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str
    operation: str
    start: float
    """ns"""
    duration: float
    """ns"""


def kind_of(kernel: Kernel) -> str:
    """What a kernel does, by its name."""
    text = f"{kernel.name} {kernel.operation}".lower()
    return next((kind for kind, parts in KINDS.items() if any(part in text for part in parts)), "element-wise")


def kernels(folder: Path) -> list[Kernel]:
    """Every kernel that a trace has seen on the first accelerator."""
    (file,) = folder.rglob("*.xplane.pb")
    data: Any = jax.profiler.ProfileData.from_file(str(file))
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    found = []
    for line in planes[0].lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            stats = dict(event.stats)
            found.append(Kernel(event.name, str(stats.get("hlo_op", "")), event.start_ns, event.duration_ns))
    return sorted(found, key=lambda kernel: kernel.start)


def busy(found: Iterable[Kernel]) -> float:
    """Nanoseconds in which at least one kernel ran."""
    total, end = 0.0, 0.0
    for kernel in found:
        total += max(0.0, kernel.start + kernel.duration - max(end, kernel.start))
        end = max(end, kernel.start + kernel.duration)
    return total


def summary(found: list[Kernel], steps: int) -> dict[str, Any]:
    """Milliseconds a step by kind, and the dearest kernels."""
    kinds: dict[str, float] = collections.defaultdict(float)
    each: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for kernel in found:
        kinds[kind_of(kernel)] += kernel.duration
        each[kernel.name, kernel.operation].append(kernel.duration)
    whole = found[-1].start + found[-1].duration - found[0].start
    dearest = sorted(each.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    ms = 1e-6 / steps
    return {
        "ms": whole * ms,
        "idle_ms": (whole - busy(found)) * ms,
        "kinds": {kind: value * ms for kind, value in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": [
            {"name": name, "operation": operation, "ms": sum(times) * ms, "count": len(times) / steps}
            for (name, operation), times in dearest
        ],
    }


def text_of(row: dict[str, Any]) -> str:
    """The summary as a table."""
    lines = [f"one step: {row['ms']:.1f} ms, of which between kernels {row['idle_ms']:.1f} ms"]
    lines += [f"  {kind:14}{ms:8.2f} ms{100 * ms / row['ms']:7.1f} %" for kind, ms in row["kinds"].items()]
    lines += ["", f"{'ms a step':>10}{'count':>7}  kernel (operation)"]
    lines += [f"{k['ms']:10.3f}{k['count']:7.0f}  {k['name'][:70]} ({k['operation'][:50]})" for k in row["kernels"]]
    return "\n".join(lines)


def profile(made: Any, steps: int = STEPS) -> dict[str, Any]:
    """Runs a step some times under the profiler."""
    for _ in range(3):
        float(made.step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            float([made.step() for _ in range(steps)][-1])
        return summary(kernels(Path(folder)), steps)


def main() -> None:
    parser = parser_of()
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.set_defaults(size="large", dropout=0.0, rows=32, length=512)
    parser.add_argument("--kind", default="jaxft-auto", help="one of step.py's contenders of ours")
    options = parser.parse_args()
    if jax.default_backend() == "cpu":
        raise SystemExit("jax finds no accelerator here: a CPU has no kernels to tell apart")
    begin = time.perf_counter()
    made = jaxft_step(options.kind, options)
    print(f"ready in {time.perf_counter() - begin:.0f} s on {made.device}", flush=True)
    row = profile(made)
    print(text_of(row))
    if options.json:
        write_atomic(Path(options.json), json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
