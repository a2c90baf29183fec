"""Sentence embeddings with large batches: jaxft against sentence-transformers' cached ranking loss.

    python benchmarks/embedding.py                                     # Debian's descriptions, batches of 1024 pairs, 32 at a time
    python benchmarks/embedding.py RUN --batch 512 --at-once 64 --turns 6 --steps 2 key=value ...
    python benchmarks/embedding.py --memory 64 512 4096                # peak memory of a few steps with batches of these sizes

Contenders, each in its own process, taking turns: `jaxft` (train.accumulation = pairs of a batch / pairs at once), `packed` (the
same with data.packing=best_fit), `torch` (CachedMultipleNegativesRankingLoss with as many at once, AdamW, clipping at norm 1,
float32, no compilation) and `shuffled` (the same with batches of any lengths, as the trainer of sentence-transformers draws them).
`jaxft` and `torch` are given the same pairs in the same steps, from the same weights, without dropout: the losses of all steps are
compared. Reading of batches is included, on both sides; the steps that compile come before. Printed: pairs a second (median of the
turns, and their range), the ratio to the last contender, the largest difference of a step's loss where the pairs are the same, and
peak memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from reported import report

from jaxft.bench.workers import Worker, answer

RUN = "configs/runs/debian_descriptions.yaml"
SAME = ("model.arch={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}", "optim.warmup_steps=0")
CONTENDERS = ("jaxft", "packed", "torch", "shuffled")
SAME_PAIRS = ("jaxft", "torch")
Step = Callable[[], tuple[int, float]]
"""Trains on one batch; returns its pairs and its loss."""


def setup_of(options: argparse.Namespace) -> Any:
    from jaxft.config import load_config

    parts = f"train.accumulation={options.batch // options.at_once}"
    if options.worker == "packed":
        packed = ["data.packing=best_fit", "data.buckets=null"]
        return prepared(options, [*packed, parts, f"train.batch_size={packed_batch(options, packed)}"])
    most = load_config(options.run, options.overrides).data.max_length * 2
    buckets = f"data.buckets={[*range(16, most, 16), most]}"
    return prepared(options, ["data.packing=none", buckets, parts])


def packed_batch(options: argparse.Namespace, packed: list[str]) -> int:
    """The batch nearest to the other contenders' whose pairs, and whose rows, can be cut into as many parts."""
    from jaxft.training.packing import rows_of_batch

    train, parts = prepared(options, packed).train, options.batch // options.at_once
    sizes = (size for size in range(parts, 2 * options.batch, parts) if rows_of_batch(train, size) % parts == 0)
    return min(sizes, key=lambda size: abs(size - options.batch))


def prepared(options: argparse.Namespace, more: list[str]) -> Any:
    from jaxft.config import load_config
    from jaxft.training.setup import Times, prepare

    same = [*SAME, f"train.batch_size={options.batch}", "optim.schedule=constant", "optim.weight_decay=0.0"]
    return prepare(load_config(options.run, [*same, *more, *options.overrides]), lambda line: None, Times())


def jaxft_step(options: argparse.Namespace) -> Step:
    import jax
    import numpy as np

    from jaxft.data.loader import stream, to_global
    from jaxft.parallel.sharding import replicated
    from jaxft.training import programs
    from jaxft.training.packing import examples_in

    setup = setup_of(options)
    batches = setup.train_batches(0)
    made = programs.compile_programs(setup, lambda line: None)
    shapes = {batches.shape_of(number) for number in range(options.last)}
    made.compilation.wait("train", tuple(shapes))
    made.compilation.stop()
    with jax.set_mesh(setup.mesh):
        state = made.init(setup.start_params(0, lambda line: None))
    seed = jax.device_put(np.uint32(0), replicated(setup.mesh))
    rows, at = stream(batches, 0, 1 << 30, setup.config.data.read_ahead), iter(range(1 << 30))

    def step() -> tuple[int, float]:
        nonlocal state
        number = next(at)
        shape, pairs = batches.shape_of(number), examples_in(setup.train, batches.rows_of(number))
        with jax.set_mesh(setup.mesh):
            batch = to_global(next(rows), setup.fields, setup.mesh, setup.model.compute.rules, batches.batch_size)
            state, metrics = made.train[shape](state, batch, seed)
        return pairs, float(metrics["loss"]) / float(metrics["weight"])

    return step


def torch_step(options: argparse.Namespace) -> Step:
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from jaxft.data.sources.read import iter_rows
    from jaxft.hub.source import resolve_folder

    torch.set_num_threads(os.cpu_count() or 1)
    setup = setup_of(options)
    config, batches = setup.config, setup.train_batches(0)
    texts = [row.values for row in iter_rows(config.data.train, (config.data.text, config.data.text_pair))]
    model = SentenceTransformer(str(resolve_folder(config.model.init)), device="cpu")
    model.max_seq_length = config.data.max_length
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.train()
    loss_of = CachedMultipleNegativesRankingLoss(model, scale=config.task.scale, mini_batch_size=options.at_once)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.learning_rate, weight_decay=0.0, eps=config.optim.eps
    )
    at = iter(range(1 << 30))
    order = np.random.default_rng(0).permutation(len(texts))

    def rows_of(number: int) -> Any:
        if options.worker == "torch":
            return batches.rows_of(number)
        return np.take(order, range(number * options.batch, (number + 1) * options.batch), mode="wrap")

    def step() -> tuple[int, float]:
        chosen = [texts[row] for row in rows_of(next(at))]
        loss = loss_of([model.preprocess([row[side] for row in chosen]) for side in (0, 1)], torch.zeros(0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return len(chosen), float(loss.detach())

    return step


def worker(options: argparse.Namespace) -> None:
    step = (jaxft_step if options.worker in ("jaxft", "packed") else torch_step)(options)
    losses = [step()[1]]
    answer({})
    for line in sys.stdin:
        start, pairs = time.perf_counter(), 0
        for _ in range(int(line)):
            done, loss = step()
            pairs += done
            losses.append(loss)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        answer({"seconds": time.perf_counter() - start, "pairs": pairs, "losses": losses, "peak_gib": peak})


def started(options: argparse.Namespace, name: str, batch: int, last: int) -> Worker:
    more = ["--worker", name, "--batch", str(batch), "--at-once", str(min(options.at_once, batch)), "--last", str(last)]
    command = [sys.executable, "-W", "ignore", __file__, options.run, *options.overrides, *more]
    return Worker(name, command, {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"})


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    workers: dict[str, Worker] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    try:
        for name in options.contenders:
            workers[name] = started(options, name, options.batch, 1 + options.turns * options.steps)
            workers[name].read()
        for _ in range(options.turns):
            for name, one in workers.items():
                turns[name].append(one.ask(str(options.steps)))
                time.sleep(0.2)  # worker threads of the one before spin for a while
    finally:
        for one in workers.values():
            one.close()
    found = []
    for name, each in turns.items():
        speeds = [one["pairs"] / one["seconds"] for one in each]
        found.append(
            {
                "kind": name,
                "pairs_per_s": [statistics.median(speeds), min(speeds), max(speeds)],
                "losses": each[-1]["losses"],
                "peak_gib": each[-1]["peak_gib"],
            }
        )
    return found


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender and size of a batch."""
    found = []
    for name in options.contenders:
        for batch in options.memory:
            one = started(options, name, batch, 1 + options.steps)
            try:
                one.read()
                found.append({"kind": name, "batch": batch, "peak_gib": one.ask(str(options.steps))["peak_gib"]})
            finally:
                one.close()
            print(f"{name:8}batch {batch:6}  peak {found[-1]['peak_gib']:.3f} GiB", flush=True)
    return found


def text_of(rows: list[dict[str, Any]]) -> str:
    base = rows[-1]
    lines = [f"{'':8}{'pairs/s':>10}{'min':>9}{'max':>9}{'ratio':>8}{'peak GiB':>10}{'loss differs':>14}{'loss':>20}"]
    for row in rows:
        median, least, most = row["pairs_per_s"]
        ratio, apart = median / base["pairs_per_s"][0], ""
        if row["kind"] in SAME_PAIRS and (same := [one["losses"] for one in rows if one["kind"] == "torch"]):
            apart = f"{max(abs(a - b) / abs(b) for a, b in zip(row['losses'], same[0], strict=True)):.1e}"
        course = f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
        lines.append(
            f"{row['kind']:9}{median:9.1f}{least:9.1f}{most:9.1f}{ratio:8.2f}{row['peak_gib']:10.2f}{apart:>14}{course:>20}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=RUN)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--batch", type=int, default=1024, help="pairs of a batch (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=32, help="pairs computed together (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="of a turn (default: %(default)s)")
    parser.add_argument("--memory", nargs="+", type=int, help="peak memory with batches of these sizes, and no times")
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "sentence-transformers")
    if options.memory:
        return report(options, packages, memory, lambda rows: "")  # said as they come
    report(options, packages, compare, text_of)


if __name__ == "__main__":
    main()
