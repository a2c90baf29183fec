"""Fine-tuning on short texts: rows packed with several texts each, against padding, and against torch.

    python benchmarks/packing.py                     # WordNet-8 with MiniLM, as configs/runs/wordnet8_minilm.yaml has it
    python benchmarks/packing.py configs/runs/translate_en_de.yaml       # pairs of texts, its data made as that file says
    python benchmarks/packing.py RUN --turns 6 --seconds 5 key=value ...

Contenders, each in its own process, taking turns: `packed` (data.packing=best_fit), `buckets` (batches of similar length, in the
buckets of the run file), `longest` (every row padded to data.max_length), and `torch`, a loop over `transformers` as its Trainer
has it with its defaults: shuffled batches padded to their own longest row, AdamW, clipping at norm 1, float32, no compilation.
All read the same texts and take batches of train.batch_size texts (packed: on average), with the dropout of the model's config, and
label smoothing where the run has it. Runs of classes start from their model; encoder-decoders may be new ones, of one shape.
A turn trains for some seconds, reading of batches included; the steps that compile come before. Printed: texts a second (median of the
turns, and their range), the ratio to `longest`, and the share of tokens that are padding.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from reported import report

from jaxft.bench.workers import Worker, answer

RUN = "configs/runs/wordnet8_minilm.yaml"
LIKE = {
    "packed": ("data.packing=best_fit", "data.buckets=null"),
    "buckets": ("data.packing=none",),
    "longest": ("data.packing=none", "data.buckets=[{length}]"),
}
"""Settings of jaxft's contenders."""
CONTENDERS = (*LIKE, "torch")
Step = Callable[[], tuple[int, int, int]]
"""Trains on one batch; returns its texts, their tokens, and the tokens that were computed."""


def config_of(options: argparse.Namespace, kind: str) -> Any:
    from jaxft.config import load_config

    config = load_config(options.run, options.overrides)
    more = [one.format(length=config.data.max_length) for one in LIKE.get(kind, ())]
    return load_config(options.run, [*options.overrides, *more])


def jaxft_step(options: argparse.Namespace, kind: str) -> Step:
    import jax
    import numpy as np

    from jaxft.data.loader import stream, to_global
    from jaxft.parallel.sharding import replicated
    from jaxft.training import programs
    from jaxft.training.packing import examples_in
    from jaxft.training.setup import Times, prepare

    setup = prepare(config_of(options, kind), lambda line: None, Times())
    made = programs.compile_programs(setup, lambda line: None)
    batches = setup.train_batches(0)
    made.compilation.wait("train", batches.shapes())
    made.compilation.stop()
    with jax.set_mesh(setup.mesh):
        state = made.init(setup.start_params(0, lambda line: None))
    seed = jax.device_put(np.uint32(0), replicated(setup.mesh))
    rows, at = stream(batches, 0, 1 << 30, setup.config.data.read_ahead), iter(range(1 << 30))

    def step() -> tuple[int, int, int]:
        nonlocal state
        number = next(at)
        shape, chosen = batches.shape_of(number), batches.rows_of(number)
        with jax.set_mesh(setup.mesh):
            batch = to_global(next(rows), setup.fields, setup.mesh, setup.model.compute.rules, batches.batch_size)
            state, metrics = made.train[shape](state, batch, seed)
        jax.block_until_ready(metrics["loss"])
        tokens = sum(int(setup.train.sizes(axis)[chosen].sum()) for axis, _ in shape.sizes)
        return examples_in(setup.train, chosen), tokens, shape.rows * sum(size for _, size in shape.sizes)

    return step


def classifier(config: Any, found: Any) -> tuple[Any, Any, Any]:
    """A model of classes on torch, its rows, and what makes batches of them."""
    import transformers

    from jaxft.hub.source import resolve_folder

    folder, labels = resolve_folder(config.model.init), len(found.targets.labels)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    rows = [
        {"input_ids": row["tokens"].tolist(), "token_type_ids": row["types"].tolist(), "labels": int(row["labels"])}
        for row in map(found.train.__getitem__, range(len(found.train)))
    ]
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    return model, rows, transformers.DataCollatorWithPadding(tokenizer)


def writer(config: Any, found: Any) -> tuple[Any, Any, Any]:
    """An encoder-decoder on torch, its pairs, and what makes batches of them."""
    import transformers

    from jaxft import models
    from jaxft.hub.source import make_config, resolve_folder

    if config.model.init is not None:
        folder = resolve_folder(config.model.init)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    else:
        family, folder = models.family(config.model.family), resolve_folder(config.data.tokenizer)
        shape = family.config_to_hf(make_config(family, dict(config.model.arch)))
        named = transformers.AutoConfig.for_model(config.model.family, **shape)
        model = transformers.AutoModelForSeq2SeqLM.from_config(named)
    rows = [
        {"input_ids": row["tokens"].tolist(), "labels": row["target"].tolist()}
        for row in map(found.train.__getitem__, range(len(found.train)))
    ]
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    return model, rows, transformers.DataCollatorForSeq2Seq(tokenizer, model)


def torch_step(options: argparse.Namespace, kind: str) -> Step:
    import torch

    from jaxft import tasks
    from jaxft.training.processors import processor_of
    from jaxft.training.recipe import open_start
    from jaxft.training.rows import open_rows

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = config_of(options, kind)
    source, name = open_start(config, lambda line: None), config.task.name
    found = open_rows(config, tasks.task(name), processor_of(config, source), source, lambda line: None)
    model, rows, collate = (writer if name == "seq2seq" else classifier)(config, found)
    loader = torch.utils.data.DataLoader(
        rows, config.train.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=config.optim.learning_rate)
    smoothing = getattr(config.task, "label_smoothing", 0.0)

    def endless() -> Any:
        while True:
            yield from loader

    batches = endless()

    def step() -> tuple[int, int, int]:
        batch = next(batches)
        output, labels = model(**batch), batch["labels"]
        loss = output.loss
        if smoothing:
            loss = torch.nn.functional.cross_entropy(
                output.logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pairs = labels.ndim == 2
        tokens = int(batch["attention_mask"].sum()) + (int((labels >= 0).sum()) if pairs else 0)
        return len(labels), tokens, batch["input_ids"].numel() + (labels.numel() if pairs else 0)

    return step


def worker(options: argparse.Namespace) -> None:
    make = torch_step if options.worker == "torch" else jaxft_step
    step = make(options, options.worker)
    for _ in range(8):
        step()
    answer({})
    for line in sys.stdin:
        end, start = time.perf_counter() + float(line), time.perf_counter()
        sums = [0, 0, 0]
        while time.perf_counter() < end:
            sums = [a + b for a, b in zip(sums, step(), strict=True)]
        answer({"seconds": time.perf_counter() - start, "texts": sums[0], "tokens": sums[1], "computed": sums[2]})


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    workers: dict[str, Worker] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    try:
        for name in options.contenders:
            command = [sys.executable, __file__, options.run, *options.overrides, "--worker", name]
            workers[name] = Worker(name, command, {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"})
            workers[name].read()
        for _ in range(options.turns):
            for name, one in workers.items():
                turns[name].append(one.ask(str(options.seconds)))
                time.sleep(0.2)  # worker threads of the one before spin for a while
    finally:
        for one in workers.values():
            one.close()
    found = []
    for name, each in turns.items():
        speeds = [one["texts"] / one["seconds"] for one in each]
        padding = 1 - sum(one["tokens"] for one in each) / sum(one["computed"] for one in each)
        found.append(
            {"kind": name, "texts_per_s": [statistics.median(speeds), min(speeds), max(speeds)], "padding": padding}
        )
    return found


def text_of(rows: list[dict[str, Any]]) -> str:
    base = next((row["texts_per_s"][0] for row in rows if row["kind"] == "longest"), rows[0]["texts_per_s"][0])
    lines = [f"{'':10}{'texts/s':>10}{'min':>9}{'max':>9}{'x longest':>11}{'padding':>10}"]
    for row in rows:
        median, least, most = row["texts_per_s"]
        lines.append(
            f"{row['kind']:10}{median:10.1f}{least:9.1f}{most:9.1f}{median / base:11.2f}{row['padding']:10.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=RUN)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn (default: %(default)s)")
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    report(options, ("jax", "jaxlib", "flax", "torch", "transformers"), compare, text_of)


if __name__ == "__main__":
    main()
