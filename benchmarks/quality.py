"""Whether fine-tuning with jaxft gives models as good as fine-tuning with torch: the same rows, the same recipe, several seeds.

    python benchmarks/quality.py                     # WordNet-8 with MiniLM, as configs/runs/wordnet8_minilm.yaml has it
    python benchmarks/quality.py RUN key=value ... --seeds 0 1 2 --contenders jaxft trainer

Contenders, each run in a process of its own: `jaxft` (the run file), `packed` (the same with data.packing=best_fit), and `trainer`,
the Trainer of `transformers` with the same batch size, passes over the rows, AdamW, peak rate, warm-up, linear decay, weight decay
on the same parameters and clipping, in float32; it reads the very ids that jaxft reads. All are scored once, after the last step,
on the held-out rows. Printed: accuracy and macro F1 of each seed, mean and sample standard deviation, seconds of training with all
that belongs to it, and how far each contender's mean is from the trainer's, in standard deviations of the trainer's seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from typing import Any

from reported import report

from jaxft.bench.workers import Worker, answer

RUN = "configs/runs/wordnet8_minilm.yaml"
LIKE = {"jaxft": (), "packed": ("data.packing=best_fit", "data.buckets=null")}
"""Settings of jaxft's contenders."""
CONTENDERS = (*LIKE, "trainer")
SCORES = ("accuracy", "macro_f1")


def train_jaxft(run: str, overrides: list[str], seed: int, kind: str) -> dict[str, float]:
    import jaxft

    with tempfile.TemporaryDirectory() as out:
        last = ("eval.every=1000000", "train.export=false", f"train.seed={seed}", f"train.out={out}/run")
        began = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            found = jaxft.train(run, overrides=[*overrides, *LIKE[kind], *last])
        return {**{name: found.metrics[name] for name in SCORES}, "seconds": time.perf_counter() - began}


def train_torch(run: str, overrides: list[str], seed: int) -> dict[str, float]:
    import numpy as np
    import torch
    import transformers
    from sklearn.metrics import accuracy_score, f1_score

    from jaxft import tasks
    from jaxft.config import load_config
    from jaxft.hub.source import resolve_folder
    from jaxft.training.processors import processor_of
    from jaxft.training.recipe import open_start
    from jaxft.training.rows import open_rows

    config: Any = load_config(run, overrides)
    check(config)
    torch.set_num_threads(os.cpu_count() or 1)
    source = open_start(config, lambda line: None)
    found = open_rows(config, tasks.task("classification"), processor_of(config, source), source, lambda line: None)
    transformers.set_seed(seed)
    folder, labels = resolve_folder(config.model.init), len(found.targets.labels)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    (held_out,) = (part.split for part in found.held_out)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            out, num_train_epochs=config.train.epochs or 1, max_steps=config.train.steps or -1, seed=seed,
            per_device_train_batch_size=config.train.batch_size, per_device_eval_batch_size=config.eval.batch_size,
            learning_rate=config.optim.learning_rate, weight_decay=config.optim.weight_decay,
            warmup_steps=config.optim.warmup_fraction, lr_scheduler_type=config.optim.schedule, max_grad_norm=config.optim.clip_norm or 0.0,
            adam_beta1=config.optim.beta1, adam_beta2=config.optim.beta2, adam_epsilon=config.optim.eps,
            use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_drop_last=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, transformers.DataCollatorWithPadding(tokenizer), rows_of(found.train), rows_of(held_out)
        )
        with contextlib.redirect_stdout(sys.stderr):  # where it prints what it did
            trainer.train()
            said: Any = trainer.predict(rows_of(held_out))
    chosen = np.argmax(said.predictions, axis=-1)
    return {
        "accuracy": float(accuracy_score(said.label_ids, chosen)),
        "macro_f1": float(f1_score(said.label_ids, chosen, average="macro")),
        "seconds": time.perf_counter() - began,
    }


def check(config: Any) -> None:
    """Refuses recipes that the Trainer would follow otherwise."""
    optim = config.optim
    if (optim.name, optim.schedule, optim.end_factor, optim.warmup_steps) != ("adamw", "linear", 0.0, None):
        sys.exit(
            "quality.py compares AdamW with a linear schedule down to 0 and a share of warm-up; the run has another"
        )


def rows_of(split: Any) -> Any:
    """The very ids that jaxft trains on, as the Trainer takes them."""
    return [
        {"input_ids": row["tokens"].tolist(), "token_type_ids": row["types"].tolist(), "labels": int(row["labels"])}
        for row in map(split.__getitem__, range(len(split)))
    ]


def worker(options: argparse.Namespace) -> None:
    kind, seed = options.worker, int(options.seeds[0])
    if kind == "trainer":
        return answer(train_torch(options.run, options.overrides, seed))
    answer(train_jaxft(options.run, options.overrides, seed, kind))


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender; seeds take turns, so that a change of the machine's speed hits all alike."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.contenders}
    for seed in options.seeds:
        for name, each in found.items():
            command = [sys.executable, __file__, options.run, *options.overrides]
            more = ["--worker", name, "--seeds", str(seed)]
            one = Worker(name, [*command, *more], {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"})
            try:
                each.append(one.read())
            finally:
                one.close()
            shown = ", ".join(f"{key} {value:.4f}" for key, value in each[-1].items())
            print(f"seed {seed} {name}: {shown}", flush=True)
    return [{"kind": name, "seeds": each} for name, each in found.items()]


def text_of(rows: list[dict[str, Any]]) -> str:
    base = next((row["seeds"] for row in rows if row["kind"] == "trainer"), None)
    lines = [f"{'':10}{'accuracy':>20}{'macro F1':>20}{'seconds':>9}{'sd from trainer':>17}"]
    for row in rows:
        cells, away = "", ""
        for name in SCORES:
            values = [one[name] for one in row["seeds"]]
            cells += f"{statistics.mean(values):>11.4f} +- {_sd(values):.4f}"
        if base is not None and len(base) > 1:
            theirs, ours = ([one["accuracy"] for one in seeds] for seeds in (base, row["seeds"]))
            away = f"{(statistics.mean(ours) - statistics.mean(theirs)) / max(_sd(theirs), 1e-9):+.2f}"
        seconds = statistics.median(one["seconds"] for one in row["seeds"])
        lines.append(f"{row['kind']:10}{cells}{seconds:9.1f}{away:>17}")
    return "\n".join(lines)


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=RUN)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    report(options, ("jax", "jaxlib", "flax", "torch", "transformers", "accelerate"), compare, text_of)


if __name__ == "__main__":
    main()
