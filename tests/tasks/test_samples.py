"""Texts that a run shows of what its model writes: where they go, what they are, and that the run is the same without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import refusal, rows, run, write_decoder_tokenizer

from jaxft.config import LogConfig
from jaxft.reporting.sinks import open_sinks

Capture = pytest.CaptureFixture[str]
ARCH = (
    "model.arch={vocab_size: 64, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
    "intermediate_size: 32, max_position_embeddings: 32, initializer_range: 0.5}"
)


def settings(folder: Path, *more: str) -> list[str]:
    tokenizer = write_decoder_tokenizer(folder / "tokenizer")
    texts = folder / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text, _ in rows(80)))
    return [
        "task.name=causal_lm", "model.family=llama", ARCH, f"data.train={texts}", f"data.tokenizer={tokenizer}", "data.max_length=24",
        "data.packing=best_fit", "train.batch_size=8", "train.steps=6", "eval.every=2", "checkpoint.keep=9", "log.progress=off",
        f"train.compilation_cache={folder / 'xla'}", "eval.batch_size=8", "optim.learning_rate=1e-2", *more,
    ]  # fmt: skip


def test_a_file_of_samples_is_cut_to_the_step_that_a_run_goes_on_from(tmp_path: Path, capsys: Capture) -> None:
    def write(start: int, *steps: int, **config: Any) -> list[Any]:
        said = LogConfig(progress="off", **config)
        with open_sinks(tmp_path, said, start_step=start, total_steps=9, run_config={}) as sinks:
            for step in steps:
                sinks.samples(step, [{"prompt": "the\nred\x1b[2J cat", "text": f"sings {step}", "wanted": "x"}])
        return [json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    assert write(0, 2, 4, prompts=("a",)) == ["sings 2", "sings 4"]
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:2]] == [
        ["prompt", "|", "text", "|", "wanted"],
        ["the", "red\N{REPLACEMENT CHARACTER}[2J", "cat", "|", "sings", "2", "|", "x"],
    ]
    whole = (tmp_path / "samples.jsonl").read_bytes()
    assert write(2, 4, samples=1) == ["sings 2", "sings 4"]
    assert (tmp_path / "samples.jsonl").read_bytes() == whole
    assert write(2) == ["sings 2"]  # nobody asks for samples any more


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("mesh.data=4", "mesh.tensor=2")])
def test_prompts_are_gone_on_with_at_every_evaluation(mesh: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    asked = ["log.prompts=[the cat, the, 'the old house']", "log.sample_tokens=5", "log.tensorboard=true"]
    usual = settings(tmp_path, *mesh)
    code, out, err = run(capsys, "train", *usual, *asked, f"train.out={tmp_path / 'out'}")
    assert code == 0, err
    kept = tmp_path / "out" / "samples.jsonl"
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(one["step"], one["prompt"]) for one in found] == [
        (step, prompt) for step in (2, 4, 6) for prompt in ("the cat", "the", "the old house")
    ]
    assert out.count("  prompt") == 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## What it wrote at step 6" in report
    assert f"| the cat | {found[-3]['text'].strip()} |" in report
    assert len({one["text"] for one in found}) > 3
    # The exported model is that of the last step, the best one: it writes the same.
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [one["loss"] for one in log if one["kind"] == "eval"]
    assert losses[-1] == min(losses)
    given = [word for one in found[-3:] for word in ("--prompt", one["prompt"])]
    code, text, err = run(capsys, "generate", tmp_path / "out" / "export", *given, "--max-new-tokens", 5)
    assert code == 0, err
    assert [json.loads(line)["text"] for line in text.splitlines()] == [one["text"] for one in found[-3:]]
    # Stopped after step 4, what was written later is written again.
    whole = kept.read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "6")
    kept.write_bytes(whole.replace(b'"step": 6', b'"step": 7'))
    code, _, err = run(capsys, "train", *usual, *asked, f"train.out={tmp_path / 'out'}")
    assert code == 0, err
    assert kept.read_bytes() == whole
    # Without samples it is the same run.
    code, _, err = run(capsys, "train", *usual, f"train.out={tmp_path / 'plain'}")
    assert code == 0, err
    assert not (tmp_path / "plain" / "samples.jsonl").exists()
    left, right = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("out", "plain"))
    assert all(np.array_equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("log.samples=2", "log.samples=2: this task goes on with prompts; give log.prompts instead"),
        ("log.samples=-1", "log.samples=-1: must not be negative"),
        ("log.prompts=['']", "log.prompts=[''] : has one without text"),
        (
            "log.prompts=[the]",
            "log.sample_tokens=64: a prompt of 1 tokens and as many new ones are beyond the model's limit of 32",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line(override: str, told: str, tmp_path: Path, capsys: Capture) -> None:
    assert told.replace(" :", ":") in refusal(capsys, "train", *settings(tmp_path, override))
