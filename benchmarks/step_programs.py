"""The compiled steps of every task as text, to compare two versions of jaxft: has a change of its structure changed what runs?

    python benchmarks/step_programs.py --out FOLDER [--root CHECKOUT]
    diff -r FOLDER_OF_THE_ONE FOLDER_OF_THE_OTHER && echo equal

Each case is a run of two steps by `jaxft train` of the checkout, on eight simulated CPU devices where it has a mesh; what XLA is
given for its train and evaluation steps is kept, without names of source lines.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BERT = (
    "model.family=bert", "model.arch={vocab_size: 60, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2,"
    " intermediate_size: 32, max_position_embeddings: 32}",
)  # fmt: skip
LLAMA = (
    "model.family=llama", "model.arch={vocab_size: 60, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2,"
    " num_key_value_heads: 2, intermediate_size: 32, max_position_embeddings: 32}",
)  # fmt: skip
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
CASES = {
    "classification": BERT,
    "classification-mesh": (*BERT, *MESH, "train.accumulation=2", "model.layers=scanned"),
    "classification-bf16": (*BERT, "model.matmul_dtype=bfloat16", "model.activation_dtype=bfloat16", "optim.ema=0.9"),
    "masked_lm": (*BERT, "task.name=masked_lm"),
    "masked_lm-packed-mesh": (*BERT, *MESH, "task.name=masked_lm", "data.packing=best_fit"),
    "masked_lm-tiles": (*BERT, "task.name=masked_lm", "model.vocab_tile=16"),
    "causal_lm": (*LLAMA, "task.name=causal_lm"),
    "causal_lm-packed-mesh": (*LLAMA, *MESH, "task.name=causal_lm", "data.packing=best_fit", "model.remat=full"),
}
# Names of source lines, and the tables of them that newer versions of XLA write before the first computation.
_NOISE = re.compile(
    r", metadata=\{[^}]*\}|, origin=\{[^}]*\}|^FileNames\n.*?^StackFrames\n.*?\n\n", re.MULTILINE | re.DOTALL
)


def steps_of(case: str, root: Path, scratch: Path) -> dict[str, str]:
    """The programs of one case by name."""
    dumped = scratch / case
    devices = 8 if "mesh" in case else 1
    flags = f"--xla_force_host_platform_device_count={devices} --xla_dump_to={dumped}"
    flags += " --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*step.*"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    run = (
        *("train", f"data.train={scratch / 'rows.csv'}", f"data.tokenizer={scratch / 'tokenizer'}", "data.max_length=16"),
        *(() if "packed" in case else ("data.buckets=[16]",)), *("train.batch_size=16", "eval.batch_size=16"),
        *("train.steps=2", "train.export=false", "train.compilation_cache=null", f"train.out={scratch / 'runs' / case}", *CASES[case]),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "jaxft", *run], env=environment, cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr or done.stdout}")
    found = {}
    for path in sorted(dumped.glob("*.before_optimizations.txt")):
        kind = path.name.split(".")[1]
        found[f"{case}.{kind}"] = _NOISE.sub("", path.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout that is asked (default: this one)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import rows, write_csv, write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_tokenizer(scratch / "tokenizer")
        write_csv(scratch / "rows.csv", rows(64))
        for case in CASES:
            for name, text in steps_of(case, options.root.resolve(), scratch).items():
                (options.out / f"{name}.txt").write_text(text)
                print(f"{name}: {len(text.splitlines())} lines", flush=True)


if __name__ == "__main__":
    main()
