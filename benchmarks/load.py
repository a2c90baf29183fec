"""Time and peak memory of loading a checkpoint: jaxft against transformers on torch, in alternating fresh processes.

    python benchmarks/load.py                    # a random BERT-base, made in a temporary folder
    python benchmarks/load.py path/to/folder --repeats 5

"load" is the loading call, "process" a whole process with its imports; the file is in the page cache. "peak" is the
process's peak resident size less what it was after the imports, over the size of the weights. Both sides end with float32
parameters in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_JAXFT = """
import json, resource, sys, time
import jax, numpy, jaxft
from jaxft import checkpoint
from jaxft.hub import pretrained, source
from jaxft.data.processors import tokenizer
jax.devices()
jax.jit(lambda: jax.numpy.zeros(3))().block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
source = source.open_source(sys.argv[1], lambda text: None)
model = source.family.Model(source.config, source.head)
params = jax.block_until_ready(pretrained.load_params(source, model, lambda text: None))
seconds = time.perf_counter() - start
"""
_TORCH = """
import json, resource, sys, time
import torch, transformers
from transformers import AutoModel, BertModel
transformers.utils.logging.disable_progress_bar()
torch.zeros(3).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
model = AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32)
# Weights are mapped from the file: touch each, as the first forward pass would.
total = sum(float(parameter.detach().view(-1)[::1024].sum()) for parameter in model.parameters())
seconds = time.perf_counter() - start
"""
_REPORT = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_bytes": (peak - before) * 1024}))
"""


def measure(code: str, folder: Path) -> dict[str, float]:
    """One load in a fresh process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + _REPORT, str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - start}


def make_checkpoint(folder: Path) -> None:
    """A random BERT-base without a head, 438 MB."""
    import jax
    import numpy as np

    from jaxft.hub.pretrained import export_folder
    from jaxft.models.families import bert
    from jaxft.models.initial import shapes_and_axes

    model = bert.Model(bert.Config())
    rng = np.random.default_rng(0)
    shapes, _ = shapes_and_axes(model)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) * 0.02, shapes)
    export_folder(folder, {}, bert, model, params, tokenizer_folder=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "bert_base"
        if options.folder is None:
            # In a process of its own: this one stays small, and starts others quickly.
            made = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import load, pathlib"
            subprocess.run(
                [sys.executable, "-c", f"{made}; load.make_checkpoint(pathlib.Path({str(folder)!r}))"], check=True
            )
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found: dict[str, list[dict[str, float]]] = {"jaxft": [], "transformers": []}
        for _ in range(options.repeats + 1):
            found["jaxft"].append(measure(_JAXFT, folder))
            found["transformers"].append(measure(_TORCH, folder))
    print(f"{size / 1e6:.0f} MB of weights, {options.repeats} loads each after one to warm up, medians")
    print(f"{'':14}{'load s':>10}{'range':>16}{'process s':>12}{'peak / weights':>18}")
    median: dict[str, dict[str, float]] = {}
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs[1:]]
        m = median[name] = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        print(f"{name:14}{m['seconds']:10.2f}{spread:>16}{m['process']:12.2f}{m['peak_bytes'] / size:18.2f}")
    ours, theirs = median["jaxft"], median["transformers"]
    ratios = (ours["seconds"] / theirs["seconds"], ours["process"] / theirs["process"])
    print(f"jaxft / transformers: load {ratios[0]:.2f}, process {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
