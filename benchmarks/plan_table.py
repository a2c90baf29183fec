"""Plans of known runs: memory, time and MFU by the compiler's estimates, for TPU slices and GPUs that need not be there.

    python benchmarks/plan_table.py [--gpus] [--only NAME ...] [--json FILE]

Each plan is a process of its own (libtpu reads its flags once). Needs libtpu, or with --gpus jax[cuda13]; Python 3.12 with jax 0.12
is what the results in docs/planning.md are from. Of GPUs no compiler states times: theirs is the roofline, a bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# MaxText's default decoder: 1.1 B parameters.
DECODER = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 128, "max_position_embeddings": 2048, "attention_dropout": 0.0,
}  # fmt: skip


def _bert(arch: dict[str, Any], topology: str, rows: int, length: int, *more: str) -> list[str]:
    return [
        "task.name=masked_lm", "eval.metric=loss", "model.family=bert", f"model.arch={json.dumps(arch)}",
        f"train.batch_size={rows}", f"data.max_length={length}", *more, "--topology", topology,
    ]  # fmt: skip


def _decoder(topology: str, rows: int, *more: str) -> list[str]:
    return [
        "task.name=causal_lm", "eval.metric=loss", "model.family=llama", f"model.arch={json.dumps(DECODER)}",
        f"train.batch_size={rows}", "data.max_length=2048", "model.layers=scanned", "model.remat=full", "mesh.data=1",
        "mesh.fsdp=-1", *more, "--topology", topology,
    ]  # fmt: skip


FSDP_8 = ("mesh.data=-1", "mesh.fsdp=8")
BF16_GRADIENTS = "model.gradient_dtype=bfloat16"
CASES: dict[str, list[str]] = {
    "BERT-base 128": _bert(BASE, "v5e-16", 1024, 128, *FSDP_8),
    "BERT-base 128, no dropout, data 16": _bert(BASE | NO_DROPOUT, "v5e-16", 1024, 128),
    "BERT-base 128, no dropout": _bert(BASE | NO_DROPOUT, "v5e-16", 1024, 128, *FSDP_8),
    "BERT-base 128, no dropout, bf16": _bert(BASE | NO_DROPOUT, "v5e-16", 1024, 128, *FSDP_8, BF16_GRADIENTS),
    "BERT-base 128, no dropout, 2048": _bert(BASE | NO_DROPOUT, "v5e-16", 2048, 128, *FSDP_8),
    "BERT-base 128, no dropout, 2048, bf16": _bert(BASE | NO_DROPOUT, "v5e-16", 2048, 128, *FSDP_8, BF16_GRADIENTS),
    "BERT-base 512, no dropout": _bert(BASE | NO_DROPOUT, "v5e-16", 256, 512, *FSDP_8),
    "BERT-base 512, no dropout, 512": _bert(BASE | NO_DROPOUT, "v5e-16", 512, 512, *FSDP_8),
    "BERT-large 512, no dropout": _bert(LARGE | NO_DROPOUT, "v5p-64", 512, 512, "mesh.data=4", "mesh.fsdp=8"),
    "BERT-base 128, no dropout, 256 chips": _bert(
        BASE | NO_DROPOUT, "v5e-256", 16384, 128, "eval.batch_size=256", *FSDP_8
    ),
    # fsdp over all 16: 3.14 GiB is part of the goal.
    "decoder 1.1 B 2048, full remat": _decoder("v5e-16", 64, "model.vocab_tile=4000"),
}
GPU_CASES: dict[str, list[str]] = {
    "BERT-base 128, fsdp 8": _bert(BASE | NO_DROPOUT, "h100-8", 1024, 128, *FSDP_8),
    "BERT-base 128, data 8": _bert(BASE | NO_DROPOUT, "h100-8", 1024, 128),
    "decoder, fsdp 8": _decoder("h100-8", 64, "model.vocab_tile=4000"),
    "decoder, slices 8 x fsdp 8": _decoder("h100-64", 512, "model.vocab_tile=4000", "mesh.slices=8"),
    # As if one fabric joined the nodes: jaxft train takes this only where NVLink does.
    "decoder, fsdp 64": _decoder("h100-64", 512, "model.vocab_tile=4000"),
}


def plan_of(arguments: list[str], llo: bool) -> dict[str, Any]:
    """The JSON of one plan, with its wall time."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "plan.json"
        start = time.perf_counter()
        command = [sys.executable, "-m", "jaxft", "plan", *arguments, *["--llo"] * llo, "--json", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
        return json.loads(target.read_text()) | {"wall_seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", action="store_true", help="the cases for GPUs instead of those for TPUs")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--json", help="write everything")
    options = parser.parse_args()
    found = {}
    cases, kinds, width = (GPU_CASES, ["roofline"], 11) if options.gpus else (CASES, ["est", "llo"], 8)
    times = " ".join(f"{kind + ' ms':>{width}} {'MFU':>6}" for kind in kinds)
    print(f"{'run':38} {'slice':8} {'GiB':>6} {times} {'plan s':>7}", flush=True)
    for name, arguments in cases.items():
        if options.only and name not in options.only:
            continue
        plan = found[name] = plan_of(arguments, llo=not options.gpus)
        seconds, mfu = plan["seconds"], plan["mfu"]
        cells = [f"{1e3 * seconds[kind]:{width}.1f} {100 * mfu[kind]:5.1f}%" for kind in kinds if kind in seconds]
        memory = plan["memory_bytes"]["total"] / 2**30
        slice_name = plan["topology"]["name"]
        print(f"{name:38} {slice_name:8} {memory:6.2f} {' '.join(cells)} {plan['wall_seconds']:7.0f}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    versions = next(iter(found.values()))["versions"] if found else {}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), "- compiler estimates, nothing was run")


if __name__ == "__main__":
    main()
