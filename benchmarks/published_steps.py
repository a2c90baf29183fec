"""Our plans of decoders whose step times on TPUs are published: what the compiler's estimates are worth.

    python benchmarks/published_steps.py [--only 16B ...] [--json FILE]

Published: MaxText on one v5e-256 slice (MaxText/configs/v5e/README.md and the scripts beside it): 2048 tokens, full
rematerialisation, so many rows a chip. Both count useful FLOPs alike: three forward passes, half of the attention. So the ratio
of MFUs is that of step times. Published were MaxText's steps, planned are ours: a ratio of 1 says that neither the estimate nor
our step is far off. Needs libtpu, about two minutes a row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from plan_table import DECODER, plan_of

TOPOLOGY, CHIPS = "v5e-256", 256
# MaxText's default decoder, of which global_parameter_scale multiplies width, heads, MLP width and layers; rows a chip; MFU measured;
# ways of our fsdp, the rest is data parallel (theirs: fsdp 256).
PUBLISHED: dict[str, tuple[tuple[int, int, int, int], int, float, int]] = {
    "16B": ((2, 4, 4, 2), 6, 0.6110, 64),
    "32B": ((4, 4, 4, 2), 4, 0.6686, 128),
    "64B": ((4, 4, 4, 4), 2, 0.5990, 256),
}


def arguments_of(scales: tuple[int, int, int, int], rows: int, *more: str) -> list[str]:
    """Of ``jaxft plan``."""
    width, heads, mlp, layers = scales
    arch = DECODER | {
        "hidden_size": DECODER["hidden_size"] * width,
        "num_attention_heads": DECODER["num_attention_heads"] * heads,
        "num_key_value_heads": DECODER["num_key_value_heads"] * heads,
        "intermediate_size": DECODER["intermediate_size"] * mlp,
        "num_hidden_layers": DECODER["num_hidden_layers"] * layers,
    }
    return [
        "task.name=causal_lm", "eval.metric=loss", "model.family=llama", f"model.arch={json.dumps(arch)}",
        f"train.batch_size={rows * CHIPS}", "eval.batch_size=256", "data.max_length=2048", "model.layers=scanned",
        "model.remat=full", "model.vocab_tile=4000", *more, "--topology", TOPOLOGY,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PUBLISHED), help="names of rows")
    parser.add_argument("--json", help="write everything")
    options = parser.parse_args()
    print(
        f"{'model':6} {'GiB':>6} {'published MFU':>14} {'est MFU':>8} {'time':>6} {'llo MFU':>8} {'time':>6} {'plan s':>7}"
    )
    found: dict[str, Any] = {}
    for name, (scales, rows, published, fsdp) in PUBLISHED.items():
        if options.only and name not in options.only:
            continue
        mesh = ("mesh.data=-1", f"mesh.fsdp={fsdp}")
        plan = found[name] = plan_of(arguments_of(scales, rows, *mesh), llo=True) | {"published_mfu": published}
        memory = plan["memory_bytes"]["total"] / 2**30
        if not plan["mfu"]:
            print(f"{name:6} {memory:6.2f} does not fit", flush=True)
            continue
        cells = [f"{100 * plan['mfu'][kind]:7.1f}% {published / plan['mfu'][kind]:5.2f}x" for kind in ("est", "llo")]
        print(
            f"{name:6} {memory:6.2f} {100 * published:13.1f}% {' '.join(cells)} {plan['wall_seconds']:7.0f}", flush=True
        )
    print("time: the estimate over the published step")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
