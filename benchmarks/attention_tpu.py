"""Attention backends on TPUs that need not be there: the compiler's prices, memory, and the TPU rows of the table behind
`model.attention=auto`.

    python benchmarks/attention_tpu.py                        # v5e, 128 ... 8192 tokens, with and without dropout: 15 minutes
    python benchmarks/attention_tpu.py --topology v5p:2x2x1 --lengths 512 --backends fused
    python benchmarks/attention_tpu.py --table                # and write jaxft/attention/measured.json

16384 tokens in rows of the given length, 12 heads of 64, bf16, segment ids, forwards and backwards with a cotangent that is an
input. Every figure is a compiler estimate: llo, from machine code, decides (docs/planning.md says how far to trust it). Needs
libtpu; Python 3.12 with jax 0.12 is what the results in docs/attention.md are from.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxft.machine.platform import COMPILE_ENV
from jaxft.planning.hlo.llo import llo_flags

BACKENDS = ("fused", "splash", "flash", "blockwise", "xla", "jax")
TOKENS, HEADS, SIZE = 16384, 12, 64


def price(
    backend: str, length: int, dropout: float, topology: str, bits: Any, heads: str, causal: bool
) -> dict[str, Any]:
    """Compiles and prices both passes in this process."""
    folder = Path(tempfile.mkdtemp(prefix="jaxft-attention-"))
    os.environ.update(COMPILE_ENV)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {llo_flags(folder)}"
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from jaxft.attention import MaskSpec, attend, tokens_last
    from jaxft.errors import UserError
    from jaxft.layers import Compute, rows_of
    from jaxft.machine.chips import parse_topology
    from jaxft.planning.hlo import costs_of
    from jaxft.planning.hlo.llo import ChipSpeed, llo_cycles
    from jaxft.planning.measure import devices_of

    chips = parse_topology(topology)
    place = SingleDeviceSharding(devices_of(chips)[0])
    chip = chips.chip
    assert chip is not None
    n, k = (int(x) for x in (heads.split("/") * 2)[:2])
    compute = Compute("bfloat16", "bfloat16", attention=backend, dropout_bits=bits, platform="tpu")

    rows = max(TOKENS // length, 1)
    # Heads as projections give them to this backend.
    last = _takes_tokens_last(lambda: tokens_last((rows, n, length, SIZE), k, MaskSpec(causal=causal), compute))

    def both(q: Any, k: Any, v: Any, g: Any, segments: Any, seed: Any) -> Any:
        key = jax.random.wrap_key_data(seed) if dropout else None
        mask = MaskSpec(segments=segments, causal=causal)

        def one(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (rows_of(x, rows) if last else x for x in (q, k, v))
            out = attend(q, k, v, mask, compute, dropout, key)
            return out.transpose(1, 3, 0, 2).reshape(n, SIZE, -1) if last else out

        out, vjp = jax.vjp(one, q, k, v)
        return out, *vjp(g)

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    q, kv = (array((x, SIZE, rows * length) if last else (rows, x, length, SIZE)) for x in (n, k))
    start = time.perf_counter()
    try:
        lowered = jax.jit(both).lower(q, kv, kv, q, array((rows, length), jnp.int32), array((2,), jnp.uint32))
        program = lowered.compile()
    except UserError as error:
        return {"refused": str(error)}
    except jax.errors.JaxRuntimeError as error:
        return {"refused": " ".join(str(error).split())[:200]}
    text = program.as_text()
    assert text is not None
    found = llo_cycles(folder, text, ChipSpeed(chip.clock_hz, chip.hbm_bandwidth, chip.flops))
    shutil.rmtree(folder)
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "llo_ms": 1e3 * found.seconds,
        "est_ms": 1e3 * costs_of(text).estimated_cycles / chip.clock_hz,
        "temp_mib": memory.temp_size_in_bytes / 2**20,
        "compile_seconds": time.perf_counter() - start,
        "data_dependent": len(found.data_dependent),
    }


def _takes_tokens_last(ask: Any) -> bool:
    from jaxft.errors import UserError

    try:
        return ask()
    except UserError:  # refused: said when it is traced
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--bits", choices=["hash", "threefry"], default="hash")
    parser.add_argument("--heads", default=str(HEADS), help="N or N/K")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(price(**json.loads(options.one))))
        return
    rows = []
    print(f"{'tokens':>7}{'dropout':>9}  {'backend':10}{'llo ms':>9}{'est ms':>9}{'MiB':>8}")
    for length in options.lengths:
        for dropout in options.dropouts:
            for backend in options.backends:
                case = {
                    "backend": backend, "length": length, "dropout": dropout, "topology": options.topology,
                    "bits": options.bits, "heads": options.heads, "causal": options.causal,
                }  # fmt: skip
                command = [sys.executable, __file__, "--one", json.dumps(case)]
                answer = subprocess.run(command, capture_output=True, text=True, check=False)
                if answer.returncode:
                    raise SystemExit(f"{case}: {answer.stderr[-2000:]}")
                found = json.loads(answer.stdout.splitlines()[-1])
                rows.append(case | found)
                shown = (
                    f"{found['llo_ms']:9.2f}{found['est_ms']:9.2f}{found['temp_mib']:8.0f}"
                    if "llo_ms" in found
                    else f"  {found['refused'][:90]}"
                )
                print(f"{length:7}{dropout:9.1f}  {backend:10}{shown}", flush=True)
    about = _versions() | {"topology": options.topology, "tokens": TOKENS, "heads": options.heads, "size": SIZE}
    if options.json:
        Path(options.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if options.table:
        from jaxft.bench.table import write_table

        source = f"benchmarks/attention_tpu.py: compiler estimates for {options.topology}, libtpu {about['libtpu']}"
        write_table(_table_rows(rows), "tpu", source)


def _table_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in rows:
        key = (row["length"], row["dropout"] > 0)
        entry = found.setdefault(
            key,
            {"platform": "tpu", "operands": "bfloat16", "size": SIZE, "length": key[0], "dropout": key[1], "ms": {}},
        )
        if "llo_ms" in row:
            entry["ms"][row["backend"]] = round(row["llo_ms"], 3)
    return list(found.values())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}


if __name__ == "__main__":
    main()
