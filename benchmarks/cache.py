"""What a run on a token cache costs by its number of rows: time to the first batch, memory, time of a batch.

Caches of 1,000 and of 10 million rows of 8 to 24 random tokens are written (0.6 GiB, in minutes) with the writer that `jaxft cache build`
uses, then one process per measurement prepares a run of a tiny model on each and makes batches of 32 rows. Memory is told apart as
Linux does: pages of mapped files count as resident, but are given up when memory is short; anonymous memory is not.

    python benchmarks/cache.py [--rows 10000000] [--folder /tmp/cache_benchmark] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FEW, VOCABULARY, BATCHES = 1000, 30_000, 300
CASES = {
    "buckets": ["data.buckets=[8,16,24]"],
    "packed": ["data.packing=best_fit"],
}


def arguments_of(folder: Path, rows: int, case: str) -> list[str]:
    arch = f"model.arch={{vocab_size: {VOCABULARY}, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1, "
    return [
        *("model.family=bert", arch + "intermediate_size: 16, max_position_embeddings: 512}", "task.name=masked_lm"),
        *(f"data.tokenizer={folder / 'tokenizer'}", f"data.max_length={24 if case == 'buckets' else 512}"),
        *(f"data.train={cache_of(folder, rows, case)}", f"data.eval={cache_of(folder, FEW, case)}"),
        *("train.batch_size=32", "train.steps=3", "train.export=false", "train.compilation_cache=null"),
        *("eval.batch_size=32", "log.progress=off", f"train.out={folder / f'run-{case}-{rows}'}", *CASES[case]),
    ]


def cache_of(folder: Path, rows: int, case: str) -> Path:
    return folder / f"{rows}-{case}"


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(VOCABULARY - len(words)))])}
    fast: Any = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))


def write(folder: Path, rows: int, case: str) -> None:
    """A cache as `jaxft cache build` would make it of such texts; they are never spelt out."""
    import numpy as np

    from jaxft import tasks
    from jaxft.config import load_config
    from jaxft.data.cache import write_cache
    from jaxft.data.examples import Encoded
    from jaxft.training.processors import processor_of
    from jaxft.training.rows import made_of
    from jaxft.training.setup import settled

    config = load_config(None, arguments_of(folder, rows, case))
    module = tasks.task(config.task.name)
    config = settled(config, module)
    tokenizer = processor_of(config, None)

    def encoded() -> Iterator[Encoded]:
        rng, types = np.random.default_rng(0), np.zeros(24, np.int32)
        for first in range(0, rows, FEW):
            sizes = rng.integers(8, 25, min(FEW, rows - first))
            tokens = rng.integers(5, VOCABULARY, sizes.sum(), dtype=np.int32)
            ends = np.cumsum(sizes).tolist()
            for i, (end, size) in enumerate(zip(ends, sizes.tolist(), strict=True)):
                yield Encoded({"tokens": tokens[end - size : end], "types": types[:size]}, first + i)

    about = {"rows": rows, "targets": {"labels": [], "counts": [], "problem": None}, "tokenizer": str(tokenizer.folder)}
    start = time.perf_counter()
    made = made_of(config, module, tokenizer)
    write_cache(cache_of(folder, rows, case), encoded(), module.fields(config, 0), made, lambda split: about)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in cache_of(folder, rows, case).iterdir())
    print(f"wrote {rows:,} rows in {seconds:.0f} s ({rows / seconds:,.0f} rows/s), {size / 2**20:.0f} MiB, {memory()}")


def memory() -> dict[str, float]:
    """MiB by what the system calls it: peak, anonymous and file-backed resident size."""
    text = Path("/proc/self/status").read_text()
    return {
        name: round(int(match[1]) / 1024)
        for name in ("VmHWM", "RssAnon", "RssFile")
        if (match := re.search(rf"{name}:\s+(\d+) kB", text))
    }


def child(folder: Path, rows: int, case: str) -> None:
    """One measurement, as JSON."""
    start = time.perf_counter()
    from jaxft.machine.platform import set_up_jax

    set_up_jax(None)
    from jaxft.config import load_config
    from jaxft.training import setup

    imported = time.perf_counter()
    ready = setup.prepare(load_config(None, arguments_of(folder, rows, case)), lambda text: None, setup.Times())
    batches = ready.train_batches(0)
    _ = batches[0]
    first = time.perf_counter()
    found: dict[str, Any] = {"import_s": imported - start, "first_batch_s": first - imported, **memory()}
    seconds = []
    for i in range(BATCHES):
        begin = time.perf_counter()
        _ = batches[i]
        seconds.append(time.perf_counter() - begin)
    found |= {"batch_ms": 1e3 * statistics.median(seconds), "after_batches": memory()}
    print(json.dumps({name: value if isinstance(value, dict) else round(value, 3) for name, value in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/cache_benchmark"))
    parser.add_argument("--keep", action="store_true", help="leave the caches there")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "ROWS", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.child:
        what, rows, case = options.child
        (write if what == "write" else child)(options.folder, int(rows), case)
        return
    write_tokenizer(options.folder / "tokenizer")
    command = [sys.executable, __file__, "--folder", str(options.folder), "--child"]
    for case in CASES:
        for rows in (FEW, options.rows):
            if not cache_of(options.folder, rows, case).exists():
                subprocess.run([*command, "write", str(rows), case], check=True)
        for rows in (FEW, options.rows):
            done = subprocess.run([*command, "read", str(rows), case], check=True, capture_output=True, text=True)
            print(f"{case}, {rows:,} rows: {done.stdout.strip()}", flush=True)
            trained(options.folder, rows, case)
        if not options.keep:
            shutil.rmtree(cache_of(options.folder, options.rows, case))
    if not options.keep:
        shutil.rmtree(options.folder)


def trained(folder: Path, rows: int, case: str) -> None:
    """Three steps of `jaxft train` itself."""
    shutil.rmtree(folder / f"run-{case}-{rows}", ignore_errors=True)
    command = [sys.executable, "-m", "jaxft", "train", *arguments_of(folder, rows, case)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, said
    (line,) = re.findall("time to first step: .*", said)
    print(f"{case}, {rows:,} rows: jaxft train: {line}; peak {used.ru_maxrss / 1024:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
