"""One training step: jaxft against `transformers` on torch, alternating, on this machine.

    python benchmarks/step.py                        # base and MiniLM sizes, dropout on and off
    python benchmarks/step.py --sizes minilm --turns 10
    python benchmarks/step.py --sizes large --rows 32 --length 512 --dropouts 0 --together 8 --accelerator \\
        --contenders torch-bf16-compile torch-bf16-autocast jaxft-auto          # on a GPU

Each contender lives in its own process; they take turns, so that a change of the machine's speed hits all alike, and sleep
meanwhile. A turn is one step that is not counted, then `--turn` counted ones back to back, as in training: the first step
after a pause pays for the pause (a virtual machine may have given the freed memory of a process back to its host; that
step is printed apart). Same shapes, same optimizer (AdamW, clipping at norm 1), no padding. Printed: median and spread in
milliseconds, the ratio of medians to the first contender (above 1: faster), tokens a second, peak memory, and MFU where the
device's peak is known.

jaxft's step is that of `jaxft train`, its recipe made of the same configuration (`overrides_of`); torch's has float32 weights
in any case, as jaxft's, and computes in bfloat16 by autocast. `--together N` times N steps that are sent off one after the
other, as a training loop does that reads its metrics late; accelerators need it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.bench.machine import machine
from jaxft.bench.workers import Worker, answer
from jaxft.errors import UserError
from jaxft.files import write_atomic

BERT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LLAMA = (*BERT, "num_key_value_heads", "vocab_size")
SIZES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "base": ("bert", "Bert", dict(zip(BERT, (768, 12, 12, 3072), strict=True))),
    "large": ("bert", "Bert", dict(zip(BERT, (1024, 24, 16, 4096), strict=True))),
    "minilm": ("bert", "Bert", dict(zip(BERT, (384, 6, 12, 1536), strict=True))),
    "smollm": ("llama", "Llama", dict(zip(LLAMA, (576, 30, 9, 1536, 3, 49152), strict=True))),
    "modernbert": ("modernbert", "ModernBert", {"vocab_size": 50368}),
    "deberta": (
        "deberta_v2",
        "DebertaV2",
        dict(zip(BERT, (768, 12, 12, 3072), strict=True))
        | {"vocab_size": 128100, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 256}
        | {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0}
        | {"max_relative_positions": -1, "layer_norm_eps": 1e-7},
    ),
    "vit": ("vit", "ViT", dict(zip(BERT, (768, 12, 12, 3072), strict=True)) | {"image_size": 224, "patch_size": 16}),
    "fashion": (
        "vit",
        "ViT",
        dict(zip(BERT, (128, 4, 4, 256), strict=True)) | {"image_size": 28, "patch_size": 7, "num_channels": 1},
    ),
    "tiny-bert": ("bert", "Bert", dict(zip(BERT, (32, 2, 2, 64), strict=True))),
    "tiny-llama": ("llama", "Llama", dict(zip(LLAMA, (32, 2, 4, 64, 2, 512), strict=True))),
}
"""Family, its name in the reference, and what config.json says. smollm: SmolLM-135M (Allal et al. 2025); modernbert: ModernBERT-base
(Warner et al. 2024); deberta: DeBERTa-v3-base (He et al. 2021); vit: ViT-B/16 (Dosovitskiy et al. 2021), fashion: that of
configs/runs/fashion_mnist.yaml, both with ``--length 1``, so that what is counted as tokens is images."""
CONTENDERS = (
    *("torch-float32", "torch-bf16-autocast", "torch-bf16-compile"),
    *("jaxft-float32", "jaxft-bf16-operands", "jaxft-bf16-activations", "jaxft-auto"),
)
TYPES = {
    "jaxft-float32": ("float32", "float32"),
    "jaxft-bf16-operands": ("bfloat16", "float32"),
    "jaxft-bf16-activations": ("bfloat16", "bfloat16"),
    "jaxft-auto": ("auto", "auto"),
}
"""Of matmul operands, and of what flows between layers."""
DEFAULT_CONTENDERS = [name for name in CONTENDERS if name not in ("torch-bf16-compile", "jaxft-auto")]
LABELS = 8

Step = Callable[[], Any]


class Made(NamedTuple):
    """A contender's step, in its own process."""

    step: Step
    """Sends off one step; returns its loss on the device."""
    device: str
    memory: Callable[[], float]
    """The most so far, in MiB: of the device, of a CPU of the process."""
    about: dict[str, Any]


def config_of(size: str, dropout: float, length: int) -> dict[str, Any]:
    """Of the model, by the names that config.json has for them."""
    family, _, arch = SIZES[size]
    if family == "llama":
        return arch | {"max_position_embeddings": max(2048, length), "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    if family == "vit":
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return {"num_channels": 3, **arch, **rates, "num_labels": LABELS}
    arch = {"vocab_size": 30522, **arch, "num_labels": LABELS}
    if family == "modernbert":
        return arch | {"attention_dropout": dropout, "embedding_dropout": dropout, "mlp_dropout": dropout}
    arch |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return arch | {"max_position_embeddings": max(512, length)}


def overrides_of(size: str, rows: int, length: int, dropout: float, kind: str = "jaxft-auto") -> list[str]:
    """The step as a configuration: ``key=value`` arguments of ``jaxft plan`` and ``jaxft train``."""
    family = SIZES[size][0]
    operands, activations = TYPES[kind]
    tasks = {"llama": ["task.name=causal_lm", "eval.metric=loss"], "vit": ["task.name=image_classification"]}
    task = tasks.get(family, [])
    return [
        *task,
        f"model.family={family}",
        f"model.arch={json.dumps(config_of(size, dropout, length))}",
        f"model.matmul_dtype={operands}",
        f"model.activation_dtype={activations}",
        *([] if family == "vit" else [f"data.max_length={length}", f"data.buckets=[{length}]"]),
        f"train.batch_size={rows}",
        f"eval.batch_size={rows}",
        "optim.learning_rate=1e-5",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
    ]


def data(vocabulary: int, rows: int, length: int) -> tuple[Any, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(5, min(vocabulary, 30000), (rows, length)), rng.integers(0, LABELS, rows)


def pictures(arch: dict[str, Any], rows: int) -> Any:
    """[B, H, W, C] uint8 of noise."""
    import numpy as np

    side, channels = arch["image_size"], arch["num_channels"]
    return np.random.default_rng(0).integers(0, 256, (rows, side, side, channels), np.uint8)


def torch_step(kind: str, options: argparse.Namespace) -> Made:
    import torch
    import transformers

    torch.manual_seed(0)
    gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
    device = "cuda" if gpu else "cpu"
    (family, stem, _), arch = SIZES[options.size], config_of(options.size, options.dropout, options.length)
    vocabulary = arch.get("vocab_size", 30000)
    tokens, labels = (torch.tensor(x, device=device) for x in data(vocabulary, options.rows, options.length))
    given = {"input_ids": tokens}
    library: Any = transformers
    if family == "llama":
        model = library.LlamaForCausalLM(library.LlamaConfig(**arch, use_cache=False, attn_implementation="sdpa"))
        labels = tokens
    else:
        how = {} if family == "deberta_v2" else {"attn_implementation": "sdpa"}  # it has one of its own alone
        config = getattr(library, f"{stem}Config")(**arch, **how)
        model = getattr(library, f"{stem}For{'Image' if family == 'vit' else 'Sequence'}Classification")(config)
    model = model.to(device).train()
    run: Any = torch.compile(model, backend=options.compiler) if kind == "torch-bf16-compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    # On a GPU without a mask: torch then takes its quickest kernels; nothing is padding.
    if family == "vit":  # normalised, as both sides do at each step
        raw = torch.tensor(pictures(arch, options.rows), device=device).permute(0, 3, 1, 2)
        given = {"pixel_values": (raw.float() / 255 - 0.5) / 0.5}
    elif not gpu:
        given["attention_mask"] = torch.ones_like(tokens)

    def step() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled="bf16" in kind):
            loss = run(labels=labels, **given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    memory = (lambda: torch.cuda.max_memory_allocated() / 2**20) if gpu else _process_mib
    return Made(step, torch.cuda.get_device_name() if gpu else "cpu", memory, {})


def jaxft_step(kind: str, options: argparse.Namespace) -> Made:
    import jax
    import numpy as np

    from jaxft import tasks
    from jaxft.config import load_config
    from jaxft.machine.chips import peak_of
    from jaxft.machine.memory import device_bytes, release_freed
    from jaxft.models.initial import init_params
    from jaxft.parallel.sharding import jitted, make_mesh
    from jaxft.training.flops import model_flops
    from jaxft.training.processors import stand_in_processor
    from jaxft.training.recipe import make_recipe, planned_targets

    config = load_config(None, overrides_of(options.size, options.rows, options.length, options.dropout, kind))
    arch = config.model.arch
    facts, targets = planned_targets(config, None)
    mesh, vocabulary = make_mesh(config.mesh), arch.get("vocab_size", 30000)
    processor = stand_in_processor(tasks.task(config.task.name), vocabulary, facts.inputs)
    recipe = make_recipe(config, mesh, None, targets, processor, 1000, jax.default_backend())
    shape = recipe.shape(options.rows, options.length)
    tokens, labels = data(vocabulary, options.rows, options.length)
    given = {"tokens": tokens, "labels": labels, "types": np.zeros_like(tokens)}
    if "pixels" in facts.inputs:
        given["pixels"] = pictures(arch, options.rows)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, recipe.state)
        start = jitted(recipe.start, mesh, places, donate_argnums=0)
        shapes = recipe.batch(shape)
        batch = {
            name: jax.device_put(given.get(name, np.ones(leaf.shape)).astype(leaf.dtype), leaf.sharding)
            for name, leaf in shapes.items()
        }
        begin = time.perf_counter()
        program = recipe.train_program().lower(recipe.state, shapes, recipe.seed()).compile()
        compiled = time.perf_counter() - begin
        seed = jax.device_put(np.uint32(0), recipe.seed().sharding)
        box = [start(init_params(recipe.model, 0, recipe.shardings))]
    release_freed()  # as the training loop does

    def step() -> Any:
        box[0], metrics = program(box[0], batch, seed)
        return metrics["loss"]

    kind_of_device = jax.devices()[0].device_kind
    stats: Any = program.memory_analysis()
    extra = stats.output_size_in_bytes - stats.alias_size_in_bytes
    about = {
        "flops": model_flops(recipe, shape).total,
        "peak_flops": peak_of(kind_of_device),
        "compile_seconds": compiled,
        "program_bytes": stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes + extra,
    }  # fmt: skip
    held = device_bytes()
    return Made(step, kind_of_device, _process_mib if held is None else lambda: (device_bytes() or 0) / 2**20, about)


def _process_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(options: argparse.Namespace) -> None:
    """Reads a number of steps a line, takes them, writes {"seconds" of one, "peak_mib"}."""
    made = (torch_step if options.worker.startswith("torch") else jaxft_step)(options.worker, options)
    losses = [float(made.step()) for _ in range(2)]
    answer({"ready": True, "device": made.device, "losses": losses, **made.about})
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter()
        loss = [made.step() for _ in range(count)][-1]
        float(loss)  # waits for the device
        answer({"seconds": (time.perf_counter() - start) / count, "peak_mib": made.memory()})


class Contender:
    """A worker process that takes steps when asked."""

    def __init__(self, kind: str, size: str, dropout: float, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", kind, "--size", size, "--dropout", str(dropout)]
        command += ["--rows", str(options.rows), "--length", str(options.length), "--compiler", options.compiler]
        self.kind, self.seconds, self.first, self.peak = kind, list[float](), list[float](), 0.0
        self.about: dict[str, Any] = {}
        self.error: str | None = None
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # an accelerator's memory is not one process's alone
        self.worker = Worker(kind, command, environment | ({} if options.accelerator else {"JAX_PLATFORMS": "cpu"}))

    def wait(self, until: float | None = None) -> None:
        """Returns when it is ready, or has failed, or at a time of `time.monotonic`."""
        try:
            self.about = self.worker.read(None if until is None else until - time.monotonic())
        except UserError as error:
            self.error = str(error)

    def turn(self, steps: int, together: int) -> None:
        """Takes a step after the pause and then ``steps`` more, timed in groups of ``together``."""
        if self.error is not None:
            return
        try:
            self.first.append(self._steps(1))
            self.seconds += [self._steps(together) for _ in range(max(1, steps // together))]
        except UserError as error:
            self.error = str(error)

    def _steps(self, count: int) -> float:
        answer = self.worker.ask(str(count))
        self.peak = max(self.peak, answer["peak_mib"])
        return answer["seconds"]

    def close(self) -> None:
        """Ends the worker."""
        self.worker.close()


def compare(size: str, dropout: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all contenders; they get ready side by side on an accelerator's machine, which has cores for that."""
    contenders: list[Contender] = []
    until = None if options.ready_seconds is None else time.monotonic() + options.ready_seconds
    try:
        for kind in options.contenders:
            contenders.append(Contender(kind, size, dropout, options))
            if not options.accelerator:
                contenders[-1].wait(until)
        for contender in contenders if options.accelerator else []:
            contender.wait(until)
        for _ in range(options.turns):
            for contender in contenders:
                contender.turn(options.turn, options.together)
                time.sleep(options.pause)  # worker threads of the one before spin for a while
    finally:
        for contender in contenders:
            contender.close()
    rows = rows_of(contenders, size, dropout, options)
    print(text_of(rows), flush=True)
    return rows


def rows_of(
    contenders: list[Contender], size: str, dropout: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """What was measured, as plain data; the useful FLOPs of a step are the same for all, as jaxft counts them."""
    same = {"size": size, "rows": options.rows, "length": options.length, "dropout": dropout}
    known = next((c.about for c in contenders if c.about.get("peak_flops")), {})
    found: list[dict[str, Any]] = []
    for c in contenders:
        row: dict[str, Any] = {**same, "kind": c.kind}
        if c.error is not None:
            found.append(row | {"error": c.error})
            continue
        median = statistics.median(c.seconds)
        row |= {"ms": [1e3 * x for x in (median, min(c.seconds), max(c.seconds), statistics.median(c.first))]}
        row |= {"tokens_per_second": options.rows * options.length / median, "mib": c.peak, **c.about}
        if known:
            row["mfu"] = known["flops"] / median / known["peak_flops"]
        found.append(row)
    base = next((row["ms"][0] for row in found if "ms" in row), None)
    return [row | {"ratio": base / row["ms"][0]} if "ms" in row else row for row in found]


def text_of(rows: list[dict[str, Any]]) -> str:
    """A table of the contenders of one size."""
    first = rows[0]
    base = next((row["kind"] for row in rows if "ms" in row), "-")
    lines = [
        f"\n{first['size']}, {first['rows']} x {first['length']} tokens, dropout {first['dropout']}",
        f"{'':24}{'median ms':>10}{'min':>9}{'max':>9}{'after pause':>13}{'x ' + base:>22}{'tokens/s':>11}"
        f"{'peak MiB':>10}{'MFU':>8}",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['kind']:24}{row['error']}")
            continue
        ms = row["ms"]
        mfu = f"{100 * row['mfu']:6.1f} %" if "mfu" in row else ""
        lines.append(
            f"{row['kind']:24}{ms[0]:10.1f}{ms[1]:9.1f}{ms[2]:9.1f}{ms[3]:13.1f}{row['ratio']:22.2f}"
            f"{row['tokens_per_second']:11,.0f}{row['mib']:10.0f}{mfu:>8}"
        )
    return "\n".join(lines)


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base", "minilm"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT_CONTENDERS)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--turn", type=int, default=4, metavar="STEPS")
    parser.add_argument("--together", type=int, default=1, metavar="STEPS", help="timed as one (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--accelerator", action="store_true", help="on the accelerator, not on the CPU")
    parser.add_argument("--ready-seconds", type=float, help="contenders that have not compiled by then are left out")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend (default: %(default)s)")
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--dropout", type=float, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = parser_of().parse_args()
    if options.worker:
        return worker(options)
    about = machine(("jax", "jaxlib", "flax", "torch", "transformers"))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        for dropout in options.dropouts:
            rows += compare(size, dropout, options)
            if options.json:
                write_atomic(Path(options.json), json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    if not any("ms" in row for row in rows):
        raise SystemExit("nothing could be measured; see above")


if __name__ == "__main__":
    main()
