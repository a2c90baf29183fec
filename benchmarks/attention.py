"""The attention figures of docs/attention.md, and the CPU rows of the table behind `model.attention=auto`.

    python benchmarks/attention.py                  # torch SDPA beside jaxft at 128, 512, 2048 and 8192 tokens: 8 minutes
    python benchmarks/attention.py --table          # and write what was measured into jaxft/attention/measured.json

One command for any machine and any case: `jaxft bench attention --help`. This one fixes the cases. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxft.__main__ import main as jaxft
from jaxft.bench.attention import Result
from jaxft.bench.results import read_results
from jaxft.bench.table import rows_of, write_table

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--lengths", nargs="+", default=["128", "512", "2048", "8192"])
    options = parser.parse_args()
    folder = ROOT / "benchmarks/results"
    common = ["bench", "attention", "--shape", "2x12x64", "--turns", "4", "--backends", "native", "blockwise", "xla"]
    runs = {
        "attention": ["jax", "--operands", "float32", "bfloat16", "--lengths", *options.lengths],
        "attention_dropout": ["--dropout", "0.1", "--lengths", "128", "512"],
    }
    found: list[Result] = []
    for name, arguments in runs.items():
        if jaxft([*common, *arguments, "--out", str(folder / name)]):
            raise SystemExit(1)
        found += read_results(folder / name / "attention.json").values()
    if options.table:
        about = json.loads((folder / "attention/attention.json").read_text())["machine"]
        write_table(rows_of(found), "cpu", f"benchmarks/attention.py: {about['cpu']}, jax {about['jax']}")


if __name__ == "__main__":
    main()
