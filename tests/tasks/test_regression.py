"""A number for each text: losses and scores as torch and scipy have them, runs, answers, exports, and rows that cannot be learnt."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_folder, refusal, run

from jaxft.models.contract import Output
from jaxft.tasks import collected
from jaxft.tasks._correlation import pearson, spearman
from jaxft.tasks.regression import Task

Capture = pytest.CaptureFixture[str]


def _output(made: Output, batch: Any, key: Any) -> Output:
    return made


def scores(said: np.ndarray, right: np.ndarray, loss: Any = "mse", weights: np.ndarray | None = None) -> dict[str, Any]:
    """Scores of answers, from three batches."""
    weights, parts = np.ones(len(said)) if weights is None else weights, []
    for some in np.array_split(np.arange(len(said)), 3):
        batch = {
            "labels": jnp.asarray(right[some], jnp.float32),
            "weights": jnp.asarray(weights[some], jnp.float32),
        }
        made = Output(jnp.zeros((1, 1, 1)), logits=jnp.asarray(said[some, None], jnp.float32))
        task = Task(loss=loss)
        forward = partial(_output, made)
        parts.append((task.sums(forward, batch, None), task.outputs(forward, batch)))
    return Task(loss=loss).score(*collected(parts))


@pytest.mark.parametrize("kind", ["random", "ties", "huge", "tiny"])
def test_scores_are_those_of_scipy_and_scikit_learn(kind: str) -> None:
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    right = rng.normal(size=101).astype(np.float32)
    said = (right + rng.normal(size=101)).astype(np.float32)
    if kind == "ties":
        right, said = right.round(), said.round()
    if kind in ("huge", "tiny"):
        right, said = (x * np.float32(1e18 if kind == "huge" else 1e-18) for x in (right, said))
    found = scores(said, right)
    x, y = said.astype(np.float64), right.astype(np.float64)
    expected = {
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
        "mse": metrics.mean_squared_error(y, x),
        "mae": metrics.mean_absolute_error(y, x),
        "rmse": math.sqrt(metrics.mean_squared_error(y, x)),
        "r2": metrics.r2_score(y, x),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    assert found["rows"] == 101


@pytest.mark.parametrize(("loss", "theirs"), [("mse", "mse_loss"), ("mae", "l1_loss"), ("huber", "huber_loss")])
def test_the_loss_is_torchs(loss: str, theirs: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    said, right = rng.normal(size=(2, 30)).astype(np.float32) * 2
    expected = getattr(torch.nn.functional, theirs)(torch.tensor(said[:25]), torch.tensor(right[:25]))
    found = scores(said, right, loss, (np.arange(30) < 25).astype(float))  # padding of a last batch
    assert found["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert found["rows"] == 25


def test_what_does_not_vary_has_no_correlation() -> None:
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0.1, 0.1, 0.1]), ([1], [1]), ([], []), ([1, math.nan], [1, 2])):
        assert math.isnan(pearson(np.array(x, float), np.array(y, float)))
        assert math.isnan(spearman(np.array(x, float), np.array(y, float)))
    assert pearson(np.array([1e-200, 2e-200]), np.array([1e200, 3e200])) == pytest.approx(1)


def write_rows(folder: Path, numbers: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    lines = [
        {"text": "the cat" if i % 2 else "a dog sleeps", "other": "the dog", "score": n} for i, n in enumerate(numbers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pairs_are_trained_on_scored_answered_and_exported(tmp_path: Path, capsys: Capture) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    data = write_rows(tmp_path, [0.5, "2.5", 1, 3, 0.25, 2, 0.75, 2.25])
    about = [
        f"data.train={data}",
        f"data.eval={data}",
        "data.text_pair=other",
        "data.label=score",
        "data.max_length=12",
    ]
    source = make_folder(tmp_path / "source", None)
    code, out, err = run(
        capsys, "train", f"model.init={source}", "task.name=regression", *about, "data.packing=best_fit", "train.batch_size=8",
        "train.steps=6", "optim.learning_rate=5e-3", "optim.warmup_steps=0", "train.compilation_cache=null",
        f"train.out={tmp_path / 'run'}", "eval.every=6", "log.progress=off",
    )  # fmt: skip
    assert code == 0, err
    assert "Spearman" in out
    exported = tmp_path / "run/export"
    config = json.loads((exported / "config.json").read_text())
    assert (config["problem_type"], config["id2label"]) == ("regression", {"0": "score"})

    code, out, err = run(capsys, "predict", exported, "--text", "the cat", "--pair", "the dog")
    assert code == 0, err
    number = json.loads(out)["score"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval()
    words = transformers.AutoTokenizer.from_pretrained(exported)
    with torch.no_grad():
        expected = theirs(**words("the cat", "the dog", return_tensors="pt")).logits
    assert expected.shape == (1, 1)
    assert number == pytest.approx(float(expected), abs=1e-5)

    said = tmp_path / "said.jsonl"
    code, out, err = run(capsys, "eval", tmp_path / "run", f"data.eval={data}", "--rows", said)
    assert code == 0, err
    judged = [json.loads(line) for line in said.read_text().splitlines()]
    assert [row["true"] for row in judged] == [0.5, 2.5, 1, 3, 0.25, 2, 0.75, 2.25]
    assert judged[1]["predicted"] == pytest.approx(number, abs=1e-5)
    metrics = [row["error"] ** 2 for row in judged]
    assert f"MSE {np.mean(metrics):.4f}" in " ".join(out.split())

    message = refusal(capsys, "train", f"model.init={exported}", *about, f"train.out={tmp_path / 'no'}")
    assert "is for regression (one output), not for single_label_classification" in message
    assert "task.name" in message


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (None, "is empty; every row needs a number"),
        ("", "is empty; every row needs a number"),
        ("high", "holds 'high', which is no number"),
        (True, "holds True, which is no number"),
        ("1e400", "which is no number"),
        (1e300, "which is no number"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path: Path, capsys: Capture, number: Any, said: str) -> None:
    data = write_rows(tmp_path, [1.0, number, 2.0])
    source = make_folder(tmp_path / "source", None)
    message = refusal(
        capsys, "train", f"model.init={source}", "task.name=regression", f"data.train={data}", f"data.eval={data}",
        "data.label=score", f"train.out={tmp_path / 'no'}",
    )  # fmt: skip
    assert f"{data}:2: column 'score' {said}" in message or (f"{data}:2" in message and said in message)


def test_classes_are_no_numbers(tmp_path: Path, capsys: Capture) -> None:
    data = write_rows(tmp_path, [1.0, 2.0])
    message = refusal(
        capsys, "train", f"model.init={make_folder(tmp_path / 'source', None)}", "task.name=regression", f"data.train={data}",
        f"data.eval={data}", "data.label=score", "data.labels=[a, b]", f"train.out={tmp_path / 'no'}",
    )  # fmt: skip
    assert "data.labels names classes" in message
