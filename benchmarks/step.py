"""One training step of BERT classification: jaxft against `transformers` on torch, alternating, on this machine.

    python benchmarks/step.py                        # base and MiniLM sizes, dropout on and off
    python benchmarks/step.py --sizes minilm --turns 10

Each contender lives in its own process; they take turns, so that a change of the machine's speed hits all alike, and sleep
meanwhile. A turn is one step that is not counted, then `--turn` counted ones back to back, as in training: the first step
after a pause pays for the pause (a virtual machine may have given the freed memory of a process back to its host; that
step is printed apart). Same shapes, same optimizer (AdamW, clipping at norm 1), no padding. Printed: median and spread in
milliseconds, the ratio of medians to torch float32 (above 1: faster), peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from jaxft.bench.machine import machine
from jaxft.bench.workers import Worker, answer

SIZES = {"base": (768, 12, 12, 3072), "minilm": (384, 6, 12, 1536)}
CONTENDERS = ("torch-float32", "torch-bf16-autocast", "jaxft-float32", "jaxft-bf16-operands", "jaxft-bf16-activations")
LABELS = 8


def config_of(size: str, dropout: float) -> dict[str, Any]:
    width, layers, heads, mlp = SIZES[size]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "num_labels": LABELS,
    }


def data(rows: int, length: int) -> tuple[Any, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(5, 30000, (rows, length)), rng.integers(0, LABELS, rows)


def torch_step(kind: str, options: argparse.Namespace) -> Callable[[], float]:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**config_of(options.size, options.dropout))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    tokens, labels = (torch.tensor(x) for x in data(options.rows, options.length))
    mask = torch.ones_like(tokens)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in kind):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def jaxft_step(kind: str, options: argparse.Namespace) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxft.config import OptimConfig
    from jaxft.layers import Compute
    from jaxft.memory import release_freed
    from jaxft.models import bert
    from jaxft.optim import make_optimizer, make_schedule
    from jaxft.pretrained import init_params, shapes_and_axes
    from jaxft.state import init_state
    from jaxft.step import make_train_step
    from jaxft.tasks.classification import Task

    compute = Compute(
        activation_dtype="bfloat16" if "activations" in kind else "float32",
        matmul_dtype="bfloat16" if "bf16" in kind else "float32",
    )
    model = bert.Model(bert.Config(**config_of(options.size, options.dropout)), "classification", compute)
    config = OptimConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0)
    schedule = make_schedule(config, 1000)
    optimizer = make_optimizer(config, schedule, *shapes_and_axes(model))
    state = jax.jit(lambda p: init_state(p, optimizer, False), donate_argnums=0)(init_params(model, 0))
    tokens, labels = data(options.rows, options.length)
    batch = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "mask": jnp.ones(tokens.shape, jnp.int32),
        "types": jnp.zeros(tokens.shape, jnp.int32),
        "labels": jnp.asarray(labels, jnp.int32),
        "weights": jnp.ones(labels.shape, jnp.float32),
    }
    train_step = make_train_step(model, Task(tuple("abcdefgh")), optimizer, schedule)
    run = jax.jit(train_step, donate_argnums=0).lower(state, batch, np.uint32(0)).compile()
    release_freed()  # as the training loop does
    box = [state]

    def step() -> float:
        box[0], metrics = run(box[0], batch, np.uint32(0))
        return float(metrics["loss"])

    return step


def worker(options: argparse.Namespace) -> None:
    """Reads a line, takes a step, writes {"seconds", "peak_mib"}."""
    make = torch_step if options.worker.startswith("torch") else jaxft_step
    step = make(options.worker, options)
    step()
    answer({"ready": True})
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer({"seconds": seconds, "peak_mib": peak})


class Contender:
    """A worker process that takes a step when asked."""

    def __init__(self, kind: str, size: str, dropout: float, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", kind, "--size", size, "--dropout", str(dropout)]
        command += ["--rows", str(options.rows), "--length", str(options.length)]
        self.kind, self.seconds, self.first, self.peak = kind, list[float](), list[float](), 0.0
        self.worker = Worker(kind, command, {"JAX_PLATFORMS": "cpu"})
        self.worker.read()

    def turn(self, steps: int) -> None:
        """Takes a step after the pause and then ``steps`` more."""
        self.first.append(self._step())
        self.seconds += [self._step() for _ in range(steps)]

    def _step(self) -> float:
        answer = self.worker.ask()
        self.peak = max(self.peak, answer["peak_mib"])
        return answer["seconds"]

    def close(self) -> None:
        """Ends the worker."""
        self.worker.close()


def compare(size: str, dropout: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    contenders = [Contender(kind, size, dropout, options) for kind in options.contenders]
    for _ in range(options.turns):
        for contender in contenders:
            contender.turn(options.turn)
            time.sleep(options.pause)  # worker threads of the one before spin for a while
    for contender in contenders:
        contender.close()
    base = statistics.median(contenders[0].seconds)
    print(
        f"\n{size}, {options.rows} x {options.length} tokens, dropout {dropout}, {options.turns} turns of {options.turn} steps"
    )
    print(
        f"{'':24}{'median ms':>10}{'min':>8}{'max':>8}{'after pause':>13}{'x ' + contenders[0].kind:>18}{'peak MiB':>10}"
    )
    rows = []
    for c in contenders:
        median = statistics.median(c.seconds)
        ms = [1e3 * x for x in (median, min(c.seconds), max(c.seconds), statistics.median(c.first))]
        print(
            f"{c.kind:24}{ms[0]:10.0f}{ms[1]:8.0f}{ms[2]:8.0f}{ms[3]:13.0f}{base / median:18.2f}{c.peak:10.0f}",
            flush=True,
        )
        rows.append({"size": size, "dropout": dropout, "kind": c.kind, "ms": ms, "ratio": base / median, "mib": c.peak})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base", "minilm"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--turn", type=int, default=4, metavar="STEPS")
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--dropout", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    about = machine(("jax", "jaxlib", "flax", "torch", "transformers"))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = [row for size in options.sizes for dropout in options.dropouts for row in compare(size, dropout, options)]
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
