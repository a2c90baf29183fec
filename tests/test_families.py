"""A model folder of any family, with weights: trained whole and with adapters, resumed, scored, asked, planned, trained again."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kinds import TEXTS
from safetensors.numpy import load_file
from tiny import WORDS, rows, run, write_csv, write_tokenizer

import jaxft
from jaxft import models, tasks
from jaxft.hub.pretrained import export_folder, shapes_and_axes
from jaxft.hub.sums import NAME as SUMS
from jaxft.layers import Compute
from jaxft.machine.platform import COMPILE_ENV
from jaxft.models.contract import Stack

Capture = pytest.CaptureFixture[str]
FAMILIES = TEXTS


def task_of(family: str) -> str:
    """The first task whose head the family has."""
    heads = models.family(family).HEADS
    return next(name for name in tasks.tasks() if tasks.task(name).Task.head in heads)


def make_folder(folder: Path, family: str, head: str | None, **arch: Any) -> Path:
    """A tiny random model of a family in Hugging Face layout, with a tokenizer."""
    module = models.family(family)
    config = dataclasses.replace(module.TINY, **({"num_hidden_layers": 1, "vocab_size": len(WORDS)} | arch))
    model = module.Model(config, head, Compute())
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (rng.standard_normal(leaf.shape) * 0.2).astype(leaf.dtype), shapes_and_axes(model)[0]
    )
    write_tokenizer(folder.with_name(f"{folder.name}.tokenizer"))
    export_folder(folder, {}, module, model, params, tokenizer_folder=str(folder.with_name(f"{folder.name}.tokenizer")))
    (folder / SUMS).unlink()  # some tests change its files
    return folder


def train(capsys: Capture, folder: Path, source: Path, out: str, family: str, *more: str) -> str:
    """What a run of two steps prints."""
    data = write_csv(folder / "rows.csv", rows(8))
    code, printed, err = run(
        capsys, "train", f"model.init={source}", f"task.name={task_of(family)}", f"data.train={data}", f"data.eval={data}",
        "data.max_length=12", "data.buckets=[12]", "train.batch_size=8", "eval.batch_size=8", "train.steps=2", "log.progress=off",
        "optim.learning_rate=1e-3", "optim.schedule=constant", "optim.warmup_steps=0",
        "train.compilation_cache=null", f"train.out={folder / out}", *more,
    )  # fmt: skip
    assert code == 0, err
    assert "parameters bit-equal, held-out metrics identical" in printed
    return printed


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


# Families' own tests hold their weights, test_lora their adapters.
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "llama")) for name in FAMILIES],
)
def test_from_weights_to_weights(family: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "source", family, None)
    train(capsys, tmp_path, source, "whole", family)
    prefix = models.family(family).hf_layout(models.family(family).TINY, None).prefix
    before = tensors(source)
    after = {name.removeprefix(prefix): tensor for name, tensor in tensors(tmp_path / "whole/export").items()}
    # All but a pooler, where the task's head does not look at it.
    kept = {name: tensor for name, tensor in before.items() if name in after or "pooler" not in name}
    moved = [float(np.abs(after[name] - tensor).max()) for name, tensor in kept.items()]
    assert 0 < max(moved) < 0.01  # trained, from these weights

    # From its own export, with adapters; then on, where it ended.
    exported = tmp_path / "whole/export"
    train(capsys, tmp_path, exported, "adapters", family, "model.lora.rank=2", "checkpoint.every=1")
    resumed = train(capsys, tmp_path, exported, "adapters", family, "model.lora.rank=2", "checkpoint.every=1")
    assert "step 2" in resumed

    code, printed, err = run(capsys, "eval", exported, f"data.eval={tmp_path / 'rows.csv'}", "data.max_length=12")
    assert code == 0, err
    assert "loss" in printed
    asked = run(capsys, "predict", exported, "--text", "the cat")
    assert (asked[0] == 0) == (task_of(family) == "classification"), asked
    assert "parameters" in plan(capsys, monkeypatch, exported, family)


def plan(capsys: Capture, monkeypatch: pytest.MonkeyPatch, source: Path, family: str) -> str:
    """What a plan without a compiler prints."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", *COMPILE_ENV):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards: the command sets them for the process
    code, printed, err = run(
        capsys, "plan", "--topology", "cpu:1", "--analytic", f"model.init={source}", f"task.name={task_of(family)}",
        "data.max_length=12", "train.batch_size=8", "eval.batch_size=8",
    )  # fmt: skip
    assert code == 0, err
    return printed


V4 = {"rope_theta": 10000.0, "rope_scaling": None}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "rope", [V4, {"rope_theta": 5e5, "rope_scaling": SCALED}, {"rope_parameters": SCALED | {"rope_theta": 5e5}}]
)
def test_nested_settings_of_old_and_new_configs(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, rope: dict[str, Any]
) -> None:
    source = make_folder(tmp_path / "source", "llama", "causal_lm")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (source / "config.json").write_text(json.dumps(config | rope))
    assert "parameters" in plan(capsys, monkeypatch, source, "llama")
    scaled = jaxft.load(source).model.config.rope
    assert scaled.kind == ("default" if rope is V4 else "llama3")
    # One setting of a group is changed alone.
    assert jaxft.load(source, rope={"theta": 7.0}).model.config.rope == dataclasses.replace(scaled, theta=7.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 3, 7, 8, 20])
def test_the_share_of_pairs_that_a_window_shows_is_counted(causal: bool, window: int) -> None:
    length = 8
    stack = Stack("layers", 2, 8, 2, 2, 4, causal, (window, None))
    place = np.arange(length)
    away = place[:, None] - place
    shown = (np.abs(away) < window) & ((away >= 0) | (not causal))
    whole = 0.5 if causal else 1.0
    assert stack.seen(length) == pytest.approx(((whole if window >= length else shown.mean()) + whole) / 2)


def test_local_layers_of_modernbert_are_worth_less_than_global_ones() -> None:
    config = models.family("modernbert").TINY
    (stack,) = models.family("modernbert").facts(config).stacks
    assert len(stack.windows) == stack.layers
    assert stack.seen(4) == 1.0
    assert stack.seen(64) == pytest.approx((3 + 2 * (64 * 9 - 20) / 64**2) / 5)  # three of five layers are global
