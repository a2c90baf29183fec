"""A search of learning rates: `jaxft sweep` against `hyperparameter_search` of transformers' Trainer with Optuna.

    python benchmarks/sweep.py                       # 20 trials of 40 steps: WordNet-8 with MiniLM
    python benchmarks/sweep.py RUN key=value ... --trials 20 --steps 40 --contenders jaxft optuna

Contenders, one after the other, each a process of its own: `jaxft` (`jaxft sweep RUN optim.learning_rate=1e-5..1e-3:log --search
tpe`) and `optuna` (the Trainer's search with Optuna's TPE over the same range, with the same rows, batch size, steps, warm-up and
linear decay, float32). Each trial is scored once on the held-out rows, after its last step. Printed: seconds of the whole process,
trials an hour, peak memory, and the best score that was found.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quality import RUN, check, rows_of
from reported import report

CONTENDERS = ("jaxft", "optuna")
LOW, HIGH = 1e-5, 1e-3


def settings(options: argparse.Namespace) -> list[str]:
    return [*options.overrides, f"train.steps={options.steps}", f"eval.every={options.steps}", "eval.metric=accuracy"]


def of_jaxft(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        space = f"optim.learning_rate={LOW:g}..{HIGH:g}:log"
        more = ["--search", "tpe", "--points", str(options.trials), "--out", out]
        command = [sys.executable, "-m", "jaxft", "sweep", options.run, *settings(options), space, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        results = json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))
    return {"best": results["ranking"][0]["mean"]}


def of_optuna(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    from jaxft import tasks
    from jaxft.config import load_config
    from jaxft.hub.source import resolve_folder
    from jaxft.training.processors import processor_of
    from jaxft.training.recipe import open_start
    from jaxft.training.rows import open_rows

    config: Any = load_config(options.run, settings(options))
    check(config)
    torch.set_num_threads(os.cpu_count() or 1)
    source = open_start(config, lambda line: None)
    found = open_rows(config, tasks.task("classification"), processor_of(config, source), source, lambda line: None)
    folder, labels = resolve_folder(config.model.init), len(found.targets.labels)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    (held_out,) = (part.split for part in found.held_out)
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            out, max_steps=config.train.steps, eval_strategy="steps", eval_steps=config.train.steps,
            per_device_train_batch_size=config.train.batch_size, per_device_eval_batch_size=config.eval.batch_size,
            weight_decay=config.optim.weight_decay, warmup_steps=config.optim.warmup_fraction,
            max_grad_norm=config.optim.clip_norm or 0.0, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, dataloader_drop_last=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            args=arguments,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            train_dataset=rows_of(found.train),
            eval_dataset=rows_of(held_out),
            model_init=lambda: transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=labels
            ),
            compute_metrics=accuracy,
        )
        best: Any = trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", LOW, HIGH, log=True)},
            n_trials=options.trials,
            direction="maximize",
            backend="optuna",
            compute_objective=lambda metrics: metrics["eval_accuracy"],
        )
    return {"best": best.objective}


def accuracy(said: Any) -> dict[str, float]:
    return {"accuracy": float((said.predictions.argmax(-1) == said.label_ids).mean())}


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    found = []
    for name in options.contenders:
        command = [sys.executable, "-W", "ignore", __file__, options.run, *options.overrides, "--worker", name]
        more = ["--trials", str(options.trials), "--steps", str(options.steps)]
        began = time.perf_counter()
        done = subprocess.run([*command, *more], stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT)
        seconds = time.perf_counter() - began
        found.append({"kind": name, "seconds": seconds, **json.loads(done.stdout.splitlines()[-1])})
    return found


ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}


def worker(options: argparse.Namespace) -> None:
    got = (of_jaxft if options.worker == "jaxft" else of_optuna)(options)
    children = resource.getrusage(resource.RUSAGE_CHILDREN if options.worker == "jaxft" else resource.RUSAGE_SELF)
    print(json.dumps({"best": got["best"], "peak_gib": children.ru_maxrss / 2**20}))


def text_of(rows: list[dict[str, Any]], trials: int) -> str:
    base = rows[-1]["seconds"]
    lines = [f"{'':8}{'seconds':>9}{'trials/h':>10}{'ratio':>7}{'peak GiB':>10}{'best accuracy':>15}"]
    for row in rows:
        speed = 3600 * trials / row["seconds"]
        lines.append(
            f"{row['kind']:8}{row['seconds']:9.1f}{speed:10.1f}{base / row['seconds']:7.2f}{row['peak_gib']:10.2f}{row['best']:15.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=RUN)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40, help="of a trial (default: %(default)s)")
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "accelerate", "optuna")
    report(options, packages, compare, lambda rows: text_of(rows, options.trials))


if __name__ == "__main__":
    main()
