"""A fine-tuning run through the command line, stopped by SIGTERM and gone on with, against the same run left alone.

    python benchmarks/accelerator_resume.py --out FOLDER

A small BERT with random weights learns WordNet-8 (configs/data/wordnet8), with a tokenizer made of its words. Said: accuracy,
speed, whether `log.jsonl` of both runs is equal byte for byte, and if it is not, by how much its numbers differ. The compiler is
asked for programs that add in the same order each time (--xla_gpu_deterministic_ops; on CPUs, one thread a product: under heavy
load jax 0.11.2 was once seen to differ by 1e-7 without).
"""

from __future__ import annotations

import argparse
import collections
import csv
import gzip
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxft.files import write_atomic
from jaxft.reporting.sinks import read_log

DATA = Path(__file__).parent.parent / "configs/data/wordnet8"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_tokenizer(folder: Path, size: int) -> None:
    """A WordPiece tokenizer of the most frequent words of the data."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    with gzip.open(DATA / "train.csv.gz", "rt", encoding="utf-8") as file:
        words = collections.Counter(
            word for row in csv.DictReader(file) for word in re.findall(r"\w+", row["text"].lower())
        )
    common = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))[:size]]
    ids = {word: i for i, word in enumerate([*SPECIAL, *common])}
    fast: Any = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))


def command(out: Path, tokenizer: Path, steps: int, width: int) -> list[str]:
    """The run's command line."""
    arch = {
        "vocab_size": 8192, "hidden_size": width, "num_hidden_layers": 1 if width < 64 else 4, "num_attention_heads": max(1, width // 64),
        "intermediate_size": 4 * width, "max_position_embeddings": 64,
    }  # fmt: skip
    rows = 32 if steps < 50 else 64
    return [
        *(sys.executable, "-m", "jaxft", "train"),
        "model.family=bert",
        f"model.arch={json.dumps(arch)}",
        f"data.train={DATA / 'train.csv.gz'}",
        f"data.eval={DATA / 'test.csv.gz'}",
        f"data.tokenizer={tokenizer}",
        *("data.max_length=32", "data.buckets=[32]", f"train.batch_size={rows}", "eval.batch_size=256"),
        *(f"train.steps={steps}", f"eval.every={steps // 2}", "train.log_every=1", f"checkpoint.every={steps // 4}"),
        *("optim.learning_rate=5e-4", "log.progress=off", f"train.out={out}", "train.export=false"),
        f"train.compilation_cache={out.parent / 'xla'}",
    ]


def run(arguments: list[str], environment: dict[str, str], log: Path, stop_after: int | None = None) -> int:
    """Runs a command to its end, or tells it to stop once log.jsonl has a step; returns its exit code."""
    folder = Path(next(a.split("=", 1)[1] for a in arguments if a.startswith("train.out=")))
    with log.open("a") as file:
        process = subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while stop_after is not None and process.poll() is None:
                written = folder / "log.jsonl"
                if written.exists() and len(written.read_text().splitlines()) > stop_after:
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.02)
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()


def difference(one: Path, other: Path) -> float:
    """The largest relative difference between numbers of two logs; infinite if they say something else."""
    most = 0.0
    records, others = read_log(one), read_log(other)
    if len(records) != len(others):
        return float("inf")
    for a, b in zip(records, others, strict=True):
        if a.keys() != b.keys():
            return float("inf")
        for key, value in a.items():
            if isinstance(value, int | float) and isinstance(b[key], int | float):
                most = max(most, abs(value - b[key]) / max(abs(value), 1e-12))
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where runs and tokenizer go")
    parser.add_argument("--json", metavar="FILE", help="write what was found here")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model and few steps, on the CPU")
    options = parser.parse_args()
    out = Path(options.out)
    steps, width = (12, 32) if options.rehearse else (200, 512)
    environment = dict(os.environ) | ({"JAX_PLATFORMS": "cpu"} if options.rehearse else {})
    same_order = "--xla_cpu_multi_thread_eigen=false" if options.rehearse else "--xla_gpu_deterministic_ops=true"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {same_order}".strip()
    write_tokenizer(out / "tokenizer", 8192 - len(SPECIAL))
    whole, parts, log = out / "whole", out / "parts", out / "log.txt"
    found: dict[str, Any] = {"steps": steps}
    begin = time.perf_counter()
    code = run(command(whole, out / "tokenizer", steps, width), environment, log)
    found |= {"whole": {"exit": code, "seconds": time.perf_counter() - begin}}
    if code == 0:
        resumed = command(parts, out / "tokenizer", steps, width)
        found["stopped"] = {"exit": run(resumed, environment, log, stop_after=steps // 3)}
        found["stopped"]["lines"] = len((parts / "log.jsonl").read_text().splitlines())
        found["resumed"] = {"exit": run(resumed, environment, log)}
        logs = (whole / "log.jsonl", parts / "log.jsonl")
        found["equal"] = logs[0].read_bytes() == logs[1].read_bytes()
        found["difference"] = difference(*logs)
        found["accuracy"] = json.loads((whole / "metrics.json").read_text())["accuracy"]
        speeds = [json.loads(line) for line in (whole / "timing.jsonl").read_text().splitlines()]
        found["tokens_per_second"] = statistics.median(speed["tokens_per_s"] for speed in speeds)
    if options.json:
        write_atomic(Path(options.json), json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    if not found.get("equal"):
        print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
    as_it_should = code == 0 and found["stopped"]["exit"] == 130 and found["resumed"]["exit"] == 0
    raise SystemExit(0 if as_it_should else 1)


if __name__ == "__main__":
    main()
