"""Answers to choose from: the loss of transformers, runs, answers, exports, and rows that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_folder, refusal, run

from jaxft.models.contract import Output
from jaxft.tasks.multiple_choice import Task

Capture = pytest.CaptureFixture[str]
ROWS = [
    {"text": "red cat", "choices": ["the cat sleeps", "a fish sings", "a tree"], "label": 0},
    {"text": "blue fish", "choices": ["the cat sleeps", "a fish sings"], "label": "a fish sings"},
    {"text": "old house", "choices": ["a tree", "the house", "red", "blue"], "label": "1"},
    {"text": "a tree", "choices": ["old", "the tree"], "label": 1},
] * 2


def write_rows(folder: Path, **more: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, **more}) + "\n" for row in ROWS))
    return path


def test_the_loss_is_torchs_over_the_answers_that_there_are() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, counts = (rng.normal(size=(20, 4)) * 5).astype(np.float32), rng.integers(2, 5, 20)
    labels = rng.integers(0, counts)
    counts[17:] = 0  # they only fill up the batch
    batch = {
        "starts": jnp.zeros((20, 4), jnp.int32), "counts": jnp.asarray(counts, jnp.int32),
        "labels": jnp.asarray(labels, jnp.int32), "weights": jnp.asarray(np.arange(20) < 17, jnp.float32),
    }  # fmt: skip
    sums = Task().sums(lambda *_: Output(jnp.zeros((1, 1, 1)), logits=jnp.asarray(logits)[..., None]), batch, None)
    expected = sum(
        float(torch.nn.functional.cross_entropy(torch.tensor(row[:count])[None], torch.tensor([label])))
        for row, count, label in zip(logits[:17], counts, labels, strict=False)
    )
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-6)
    assert float(sums["weight"]) == 17


NAMES = ["task.name=multiple_choice", "data.max_length=16"]


def test_a_run_answers_as_transformers_does_with_its_export(tmp_path: Path, capsys: Capture) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    data, source = write_rows(tmp_path), make_folder(tmp_path / "source", None)
    code, out, err = run(
        capsys, "train", f"model.init={source}", *NAMES, f"data.train={data}", f"data.eval={data}", "train.batch_size=8",
        "train.steps=4", "optim.learning_rate=5e-3", "optim.warmup_steps=0", "train.compilation_cache=null",
        f"train.out={tmp_path / 'run'}", "eval.every=4", "log.progress=off",
    )  # fmt: skip
    assert code == 0, err
    assert "accuracy" in out
    exported = tmp_path / "run/export"

    code, out, err = run(capsys, "predict", exported, data)
    assert code == 0, err
    said = [json.loads(line) for line in out.splitlines()]
    theirs = transformers.AutoModelForMultipleChoice.from_pretrained(exported).eval()
    words = transformers.AutoTokenizer.from_pretrained(exported)
    for row, found in zip(ROWS, said, strict=True):
        choices: Any = row["choices"]
        inputs = words([row["text"]] * len(choices), choices, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = theirs(**{name: value[None] for name, value in inputs.items()}).logits[0]
        np.testing.assert_allclose(found["probabilities"], torch.softmax(logits, 0).numpy(), atol=1e-5)
        assert found["answer"] == choices[found["choice"]]
        assert found["choice"] == int(logits.argmax())

    told = tmp_path / "told.jsonl"
    code, out, err = run(capsys, "eval", tmp_path / "run", "--rows", told)
    assert code == 0, err
    judged = [json.loads(line) for line in told.read_text().splitlines()]
    assert [row["true"] for row in judged] == [0, 1, 1, 1] * 2
    assert [row["choice"] for row in judged] == [row["choice"] for row in said]


@pytest.mark.parametrize(
    ("more", "settings", "said"),
    [
        ({"choices": ["one"]}, [], ":1: has 1 answers to choose from (columns choices: task.choices); a question needs two"),
        ({}, ["task.most_choices=3"], ":3: has 4 answers to choose from (columns choices: task.choices); task.most_choices is 3"),
        ({"label": 7}, [], ":1: column 'label' holds 7; expected the number of the right answer, 0 to 2, or its words"),
        ({}, ["task.choices=[a,a]"], "task.choices=['a', 'a']: name each column of answers once"),
        ({}, ["task.choices=[answers]"], "no column 'answers': valid names: choices, label, text"),
        ({}, ["data.labels=[a,b]"], "data.labels: multiple_choice has no classes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    more: dict[str, Any], settings: list[str], said: str, tmp_path: Path, capsys: Capture
) -> None:
    data, source = write_rows(tmp_path, **more), make_folder(tmp_path / "source", None)
    line = refusal(
        capsys, "train", f"model.init={source}", *NAMES, f"data.train={data}", f"data.eval={data}", "train.steps=1",
        f"train.out={tmp_path / 'run'}", *settings,
    )  # fmt: skip
    assert said in line
