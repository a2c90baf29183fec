"""Values and gradients of attention on this machine's accelerator: every backend that takes a request, against `reference`.

    python benchmarks/accelerator_values.py --json FILE

`reference` is the formula in float32 at the highest precision, fed with the same numbers (rounded to bfloat16 first where the
operands are). Printed and written: the relative error (2-norm) of the output and of each gradient, which of them is largest, and
whether it is within its bound. Backends that refuse a request are listed with their reason: nobody may ignore a part of a mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What kernels are picked is timed elsewhere; trying them out would take most of the minutes.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.attention import MaskSpec, attend
from jaxft.attention.choice import BACKENDS
from jaxft.attention.request import Request
from jaxft.files import write_atomic
from jaxft.layers import Compute

BOUNDS = {"float32": 2e-5, "bfloat16": 1e-2}
"""Of the relative error. bfloat16 keeps 8 bits (4e-3 a rounding), and probabilities are rounded between the two products."""
PARTS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Ask:
    """What is asked of a backend."""

    name: str
    length: int = 256
    heads: int = 4
    key_heads: int = 4
    size: int = 64
    padding: bool = False
    last: bool = False
    """Whether the backend is told that padding stands behind the tokens."""
    segments: bool = False
    causal: bool = False
    window: int | None = None
    soft_cap: float | None = None
    bias: bool = False
    dropout: str | None = None
    operands: str = "float32"

    def request(self, platform: str) -> Request:
        """As a backend is asked whether it takes it."""
        return Request(
            platform, self.length, self.heads, self.key_heads, self.size, self.operands, None, self.padding, self.segments,
            self.causal, self.window, self.soft_cap is not None, self.bias, self.dropout,
        )  # fmt: skip


def asks(rehearse: bool) -> Iterator[Ask]:
    """All of them, each with float32 and bfloat16 operands."""
    lengths = (32, 40, 72) if rehearse else (128, 1024, 1100)
    short, long, odd = lengths
    kinds = [
        Ask("plain", short),
        Ask("plain, long", long),
        Ask("padding", short, padding=True),
        Ask("padding told as last", short, padding=True, last=True),
        Ask("causal", long, causal=True),
        Ask("causal, padding", long, causal=True, padding=True),
        Ask("causal, padding told as last", long, causal=True, padding=True, last=True),
        Ask("segments", long, segments=True),
        Ask("segments, causal", long, segments=True, causal=True),
        Ask("window, causal", long, causal=True, window=short // 2 + 3),
        Ask("window, two-sided", odd, window=odd // 2 + 50 if not rehearse else odd // 2 + 3),
        Ask("window, padding", long, padding=True, causal=True, window=short // 2),
        Ask("window, padding told as last", long, padding=True, last=True, causal=True, window=short // 2),
        Ask("grouped heads", short, heads=6, key_heads=2),
        Ask("grouped heads, causal, segments", long, heads=6, key_heads=2, causal=True, segments=True),
        Ask("head size 128, causal", short, size=128, causal=True),
        Ask("soft cap", short, soft_cap=5.0, causal=True),
        Ask("bias", short, bias=True),
        Ask("dropout, hash", short, dropout="hash"),
        Ask("dropout, threefry, padding", short, dropout="threefry", padding=True),
    ]
    if rehearse:
        for i, operands in ((8, "float32"), (10, "bfloat16"), (19, "float32")):
            yield dataclasses.replace(kinds[i], operands=operands)
        return
    for operands in ("bfloat16", "float32"):  # the kernels that nobody else runs for us take bfloat16
        for ask in kinds:
            yield dataclasses.replace(ask, operands=operands)


def inputs(ask: Ask) -> tuple[list[np.ndarray], MaskSpec, np.ndarray | None]:
    """q, k, v and a cotangent (2 rows, as the operands' type holds them), the mask, and the bias."""
    rng = np.random.default_rng(0)
    shapes = [(2, n, ask.length, ask.size) for n in (ask.heads, ask.key_heads, ask.key_heads, ask.heads)]
    arrays = [
        np.asarray(jnp.asarray(rng.standard_normal(s, dtype=np.float32), ask.operands), np.float32) for s in shapes
    ]
    place = np.arange(ask.length)
    real = np.stack([place < ask.length, place < ask.length // 2 + 1])
    segments = np.where(np.stack([place >= 0, place < ask.length - 5]), 1 + (place > ask.length // 3), 0).astype(
        np.int32
    )
    mask = MaskSpec(
        jnp.asarray(real) if ask.padding else None,
        jnp.asarray(segments) if ask.segments else None,
        ask.causal,
        ask.window,
    )
    bias = rng.standard_normal((1, ask.heads, ask.length, ask.length), dtype=np.float32) if ask.bias else None
    return arrays, mask, bias


def computed(ask: Ask, backend: str, platform: str) -> tuple[np.ndarray, ...]:
    """Output and gradients of q, k and v, as float32."""
    exact = backend == "reference"
    kind = "float32" if exact else ask.operands
    compute = Compute(
        kind,
        kind,
        attention=backend,
        platform=platform,
        dropout_bits=ask.dropout or "hash",  # pyrefly: ignore[bad-argument-type]
        padding_last=ask.last,
    )
    arrays, mask, bias = inputs(ask)
    rate, key = (0.1, jax.random.key(1)) if ask.dropout else (0.0, None)
    given = [jnp.asarray(x, kind) for x in arrays]

    def both(q: Any, k: Any, v: Any, g: Any, mask: MaskSpec, bias: Any) -> Any:
        def forward(q: Any, k: Any, v: Any) -> Any:
            return attend(q, k, v, mask, compute, rate, key, soft_cap=ask.soft_cap, bias=bias)

        out, back = jax.vjp(forward, q, k, v)
        return out, *back(g)

    found = jax.jit(both)(*given, mask, bias if bias is None else jnp.asarray(bias))
    return tuple(np.asarray(x.astype(jnp.float32)) for x in found)


def errors(found: tuple[np.ndarray, ...], true: tuple[np.ndarray, ...]) -> dict[str, float]:
    """Relative 2-norm errors by part; infinite where something is not finite."""
    made = {}
    for name, a, b in zip(PARTS, found, true, strict=True):
        error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
        made[name] = error if np.isfinite(error) else float("inf")
    return made


def compare(ask: Ask, platform: str) -> dict[str, Any]:
    """What each backend makes of a request."""
    true = computed(ask, "reference", platform)
    row: dict[str, Any] = {"ask": ask.__dict__, "refused": {}, "errors": {}, "failed": {}}
    for backend in BACKENDS:
        if backend.name == "reference":
            continue
        reason = backend.refuses(ask.request(platform))
        if reason is not None:
            row["refused"][backend.name] = reason
            continue
        try:
            row["errors"][backend.name] = errors(computed(ask, backend.name, platform), true)
        except Exception as error:  # noqa: BLE001 - a kernel that does not compile is a finding, not the end
            row["failed"][backend.name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return row


def text_of(row: dict[str, Any]) -> str:
    """A line per request: each backend's largest error, and what is wrong."""
    ask = row["ask"]
    bound = BOUNDS[ask["operands"]]
    parts = []
    for name, found in row["errors"].items():
        worst = max(found, key=lambda part: found[part])
        parts.append(f"{name} {found[worst]:.1e}{'' if found[worst] <= bound else f' WRONG ({worst})'}")
    parts += [f"{name} FAILED ({why})" for name, why in row["failed"].items()]
    return f"{ask['operands']:9}{ask['length']:5}  {ask['name']:32}{', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write what was found here, after every request")
    parser.add_argument(
        "--workers", type=int, default=4, help="processes that share the requests (default: %(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="few requests at small lengths, on the CPU")
    options = parser.parse_args()
    platform = jax.default_backend()
    rows: list[dict[str, Any]] = []
    print(f"on {jax.devices()[0].device_kind} ({platform}); bounds {BOUNDS}", flush=True)
    # Processes: cuDNN records a graph while it compiles, and work that another thread sends off meanwhile breaks it.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1 if options.rehearse else options.workers, fresh) as pool:
        for done in as_completed([pool.submit(compare, ask, platform) for ask in asks(options.rehearse)]):
            rows.append(done.result())
            print(text_of(rows[-1]), flush=True)
            if options.json:
                tree = {"platform": platform, "device": jax.devices()[0].device_kind, "bounds": BOUNDS, "rows": rows}
                write_atomic(Path(options.json), json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
