"""Plans of small models, for tests: run files, the command in a process of its own, and what any plan's exchanges have to be."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quick_xla import quick_flags

from jaxft.__main__ import main
from jaxft.config import load_config
from jaxft.machine.platform import COMPILE_ENV
from jaxft.parallel.sharding import make_mesh
from jaxft.tasks import Targets
from jaxft.training.processors import stand_in_tokenizer
from jaxft.training.recipe import Recipe, make_recipe

LLAMA = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 512, "attention_dropout": 0.0,
}  # fmt: skip
BERT = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
BASE = {"task.name": "causal_lm", "eval.metric": "loss", "model.family": "llama", "model.arch": json.dumps(LLAMA)}
SMALL = {"task.name": "masked_lm", "eval.metric": "loss", "model.family": "bert", "model.arch": json.dumps(BERT)}


def options(*changes: str, base: dict[str, str] = SMALL) -> list[str]:
    return [f"{key}={value}" for key, value in base.items()] + list(changes)


def plan(*arguments: str, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of the command. It decides what jax sees, and so has a process of its own, unless what it asks for is there
    and nothing is compiled."""
    if "--analytic" in arguments and arguments[arguments.index("--topology") + 1] in ("v5e-8", "cpu:1"):
        return _here(arguments, code)
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    if any(one.startswith("cpu:") for one in arguments):  # libtpu may not know these flags
        env["XLA_FLAGS"] = quick_flags()
    command = [sys.executable, "-m", "jaxft", "plan", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, done.stderr


def _here(arguments: tuple[str, ...], code: int) -> tuple[str, str]:
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        for name in ("XLA_FLAGS", "JAX_PLATFORMS", *COMPILE_ENV):  # the command sets them for its process
            patch.setenv(name, os.environ.get(name, ""))
        found = main(["plan", *arguments])
    assert found == code, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def recipe_of(base: dict[str, str], *changes: str, platform: str = "cpu") -> Recipe:
    config = load_config(None, options("train.steps=10", *changes, base=base))
    return make_recipe(config, make_mesh(config.mesh), None, Targets(), stand_in_tokenizer(512), 10, platform)


# The textbook's traffic against programs compiled for a real TPU topology. Those marked slow take half a minute each.
# Over tensor, looked-up embeddings are exchanged in the parameters' float32, twice the textbook's bytes: with three layers the
# whole is 7 % off, with two 10.2 %.
LAYOUTS = [
    pytest.param(["mesh.data=8"], id="data8", marks=pytest.mark.slow),
    pytest.param(["mesh.data=1", "mesh.fsdp=8"], id="fsdp8", marks=pytest.mark.slow),
    pytest.param(["mesh.data=1", "mesh.tensor=8"], id="tensor8", marks=pytest.mark.slow),
    pytest.param(["mesh.data=2", "mesh.context=4"], id="data2_context4", marks=pytest.mark.slow),
    pytest.param(["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"], id="2x2x2", marks=pytest.mark.slow),
]


def as_in_the_textbook(mesh: list[str], topology: str, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """(what is printed, the JSON) of a plan whose exchanges are the textbook's."""
    out, err = plan(
        *options("data.max_length=512", "train.batch_size=32", *mesh, base=BASE),
        "--topology", topology, "--json", str(tmp_path / "p.json"),
    )  # fmt: skip
    assert err == ""
    told = json.loads((tmp_path / "p.json").read_text())
    sent = sum(one["bytes_sent"] for one in told["exchanges"])
    textbook = sum(told["textbook_bytes_sent"].values())
    print(f"{mesh} on {topology}: sent {sent / 2**20:.1f} MiB, textbook {textbook / 2**20:.1f} MiB")
    assert sent == pytest.approx(textbook, rel=0.10)
    return out, told


def no_whole_weights(told: dict[str, Any]) -> None:
    """Under fsdp: gradients are scattered, never summed up whole; gathered are weights, twice at most, no optimizer state."""
    by_kind: dict[str, float] = {}
    for one in told["exchanges"]:
        by_kind[one["kind"]] = by_kind.get(one["kind"], 0.0) + one["bytes"]
    assert by_kind.get("all-reduce", 0.0) < 2**20
    weights_in_bf16 = 2 * told["parameters"]
    assert by_kind["all-gather"] <= 2 * weights_in_bf16 * 1.02
    assert "all-reduces send" not in " ".join(told["advice"])
