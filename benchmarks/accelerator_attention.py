"""Attention on this machine's accelerator: every backend that takes its requests, beside torch's flash and cuDNN kernels.

    python benchmarks/accelerator_attention.py --json FILE          # 128, 512, 2048 and 8192 tokens, bf16; a minute or two

One process has jax, one has torch; at each length their contenders take turns. Printed and written after every length: the
median milliseconds of a call, forwards and both ways, and the memory it needs beyond its inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from jaxft.bench.attention_case import QUADRATIC, TORCH, Case, Ready, make_ready
from jaxft.bench.workers import Worker, answer, keep_freed_memory
from jaxft.errors import UserError
from jaxft.files import write_atomic

TOKENS = 16384
"""Of a call, whatever the length: 128 rows of 128, 2 of 8192."""
MOST_BYTES = 48 * 2**30
"""Contenders that may need more are left out."""
PASSES = ("forward", "both")


def worker() -> None:
    """Reads lines ``{"case", "pass", "count"}``, answers with seconds; a case is compiled when it first comes, and kept until
    one of another length does."""
    keep_freed_memory()
    known: dict[str, Ready] = {}
    answer({"ready": True})
    for line in sys.stdin:
        if not line.strip():
            break
        asked = json.loads(line)
        case = Case(**asked["case"])
        if any(json.loads(key)["length"] != case.length for key in known):
            known.clear()
        try:
            ready = known[case.key] if case.key in known else make_ready(case)
            known[case.key] = ready
            seconds = ready.seconds(asked["pass"], asked["count"])
        except (UserError, RuntimeError) as error:  # a kernel that is not there, or memory that does not suffice
            known.pop(case.key, None)
            answer({"error": " ".join(str(error).split())[:200]})
            continue
        answer({"seconds": seconds, "peak_bytes": ready.memory(), **ready.about})


class Contender:
    """One backend at one length, timed by a worker that others use too."""

    def __init__(self, case: Case, worker: Worker) -> None:
        self.case, self.worker = case, worker
        self.seconds: dict[str, list[float]] = {name: [] for name in PASSES}
        self.about: dict[str, Any] = {}
        self.error: str | None = None

    def turn(self, count: int) -> None:
        """Times each pass ``count`` times, unless it has failed before."""
        for name in PASSES:
            if self.error is None:
                line = {"case": dataclasses.asdict(self.case), "pass": name, "count": count}
                got = self.worker.ask(json.dumps(line))
                self.error = got.get("error")
                self.about = got
                self.seconds[name] += got.get("seconds", [])

    def row(self) -> dict[str, Any]:
        """What was found, as plain data."""
        row = {"length": self.case.length, "rows": self.case.rows, "contender": self.case.backend}
        if self.error is not None:
            return row | {"error": self.error}
        ms = {name: 1e3 * statistics.median(self.seconds[name]) for name in PASSES}
        spread = {name: [1e3 * min(self.seconds[name]), 1e3 * max(self.seconds[name])] for name in PASSES}
        flops = {name: self.case.flops(name) / (1e-3 * ms[name]) for name in PASSES}
        ran = {name: self.about[name] for name in ("backend", "device", "platform", "peak_bytes", "compile_seconds")}
        return row | ran | {"ms": ms, "spread": spread, "flops": flops}


def backends(platform: str, case: Case) -> list[str]:
    """Backends that take a case on a platform, by their own word."""
    from jaxft.attention.choice import BACKENDS
    from jaxft.attention.request import Request

    request = Request(platform, case.length, case.heads, case.key_heads, case.size, case.operands, causal=case.causal)
    return [b.name for b in BACKENDS if b.name != "reference" and b.refuses(request) is None]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all lengths; written as they come."""
    platform = "cpu" if options.rehearse else "gpu"
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | ({"JAX_PLATFORMS": "cpu"} if options.rehearse else {})
    command = [sys.executable, __file__, "--worker"]
    workers = {"jax": Worker("jax", command, environment)}
    if importlib.util.find_spec("torch") is not None:
        workers["torch"] = Worker("torch", command, environment)
    else:
        print("torch is not installed: jaxft alone", flush=True)
    rows: list[dict[str, Any]] = []
    try:
        for one in workers.values():
            one.read()
        for length in options.lengths:
            contenders = _contenders(options, platform, length, workers)
            for _ in range(options.turns):
                for contender in contenders:
                    contender.turn(options.count)
            rows += [contender.row() for contender in contenders]
            print(text_of([row for row in rows if row["length"] == length]), flush=True)
            if options.json:
                write_atomic(Path(options.json), json.dumps({"rows": rows}, indent=1) + "\n")
    finally:
        for one in workers.values():
            one.close()
    return rows


def _contenders(options: argparse.Namespace, platform: str, length: int, workers: dict[str, Worker]) -> list[Contender]:
    rows = max(1, options.tokens // length)
    plain = Case("auto", rows, options.heads, options.heads, length, 64, "bfloat16", causal=options.causal)
    torch = TORCH[:1] if options.rehearse else ("torch-sdpa", "torch-flash", "torch-cudnn")
    names = [*backends(platform, plain), *(torch if "torch" in workers else ())]
    found = []
    for name in names:
        case = dataclasses.replace(plain, backend=name)
        if name in QUADRATIC and case.needed_bytes() > MOST_BYTES:
            print(f"{name} at {length}: left out, may need {case.needed_bytes() / 2**30:.0f} GiB", flush=True)
            continue
        found.append(Contender(case, workers["torch" if name in TORCH else "jax"]))
    return found


def text_of(rows: list[dict[str, Any]]) -> str:
    """A table of one or several lengths, with ratios to the fastest torch kernel of the length."""
    lines = [f"{'tokens':>7}  {'contender':24}{'forward ms':>11}{'both ms':>9}{'x torch':>9}{'TFLOP/s':>9}{'MiB':>8}"]
    for row in rows:
        name = row["contender"]
        if "error" in row:
            lines.append(f"{row['length']:7}  {name:24}{row['error']}")
            continue
        theirs = [
            r["ms"]["both"] for r in rows if r["length"] == row["length"] and r["contender"] in TORCH and "ms" in r
        ]
        ratio = f"{row['ms']['both'] / min(theirs):.2f}" if theirs else ""
        mib = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"{row['length']:7}  {name:24}{row['ms']['forward']:11.3f}{row['ms']['both']:9.3f}{ratio:>9}"
            f"{row['flops']['both'] / 1e12:9.1f}{mib:>8}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a call (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--count", type=int, default=3, help="timings of a pass in each turn")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, after every length")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at small lengths")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker()
    if options.rehearse:
        options.lengths, options.tokens, options.heads, options.turns, options.count = [32], 64, 2, 1, 1
    measure(options)


if __name__ == "__main__":
    main()
