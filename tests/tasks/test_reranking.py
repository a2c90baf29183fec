"""How well passages answer queries: orders scored as by hand and by scikit-learn, runs, answers, exports, and rows that cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import make_folder, refusal, run

from jaxft.config import load_config
from jaxft.models.contract import Output
from jaxft.tasks._retrieval import retrieval_scores
from jaxft.tasks.reranking import Task
from jaxft.training.setup import Times, prepare
from jaxft.trees import paths_of

Capture = pytest.CaptureFixture[str]


def by_hand(queries: np.ndarray, scores: np.ndarray, gains: np.ndarray, at: int) -> dict[str, float]:
    """One query after the other, one place after the other."""
    gains = gains.astype(np.float64)
    each: dict[str, list[float]] = {name: [] for name in ("hit@1", f"mrr@{at}", f"ndcg@{at}", "map", f"recall@{at}")}
    for query in set(queries.tolist()):
        mine = [(s, g) for q, s, g in zip(queries, scores, gains, strict=True) if q == query]
        order = [
            g for _, g in sorted(mine, key=lambda one: (math.isnan(one[0]), -one[0] if one[0] == one[0] else 0, one[1]))
        ]
        if not any(g > 0 for g in order):
            continue
        right = [place for place, g in enumerate(order, 1) if g > 0]
        each["hit@1"].append(float(right[0] == 1))
        each[f"mrr@{at}"].append(1 / right[0] if right[0] <= at else 0.0)
        each["map"].append(sum((n + 1) / place for n, place in enumerate(right)) / len(right))
        each[f"recall@{at}"].append(sum(place <= at for place in right) / len(right))
        found, best = (
            sum(g / math.log2(place + 1) for place, g in enumerate(one[:at], 1)) for one in (order, sorted(order)[::-1])
        )
        each[f"ndcg@{at}"].append(found / best)
    return {name: float(np.mean(values)) if values else math.nan for name, values in each.items()}


@pytest.mark.parametrize("kind", ["random", "ties", "graded", "no relevant", "NaN", "nothing"])
@pytest.mark.parametrize("at", [1, 3, 10])
def test_orders_are_scored_as_by_hand(kind: str, at: int) -> None:
    rng = np.random.default_rng(at)
    count = 0 if kind == "nothing" else 200
    queries, scores = rng.integers(0, 30, count), rng.normal(size=count).astype(np.float32)
    gains = (rng.random(count) < 0.2).astype(np.float32)
    if kind == "ties":
        scores = scores.round()
    if kind == "graded":
        gains = rng.integers(0, 4, count).astype(np.float32) / 3
    if kind == "no relevant":
        gains[:] = 0
    if kind == "NaN":
        scores[::7] = np.nan
    found = retrieval_scores(queries, scores, gains, at)
    expected = by_hand(queries, scores, gains, at)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert found["queries"] + found["without_relevant"] == len(np.unique(queries))


def test_gains_are_discounted_as_scikit_learn_does() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, gains = rng.normal(size=(20, 30)), rng.integers(0, 4, (20, 30)).astype(float)
    gains[:, 0] = 1  # each query has a relevant one
    found = retrieval_scores(np.arange(20).repeat(30), scores.ravel(), gains.ravel(), 10)
    assert found["ndcg@10"] == pytest.approx(metrics.ndcg_score(gains, scores, k=10), abs=1e-12)
    kinds = [metrics.average_precision_score(g > 0, s) for g, s in zip(gains, scores, strict=True)]
    assert found["map"] == pytest.approx(np.mean(kinds), abs=1e-12)


def test_the_loss_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logits, right = (rng.normal(size=20) * 20).astype(np.float32), rng.random(20).astype(np.float32)
    batch = {"labels": jnp.asarray(right), "weights": jnp.asarray((np.arange(20) < 17).astype(np.float32))}
    sums = Task(positive_weight=3.0).sums(
        lambda *_: Output(jnp.zeros((1, 1, 1)), logits=jnp.asarray(logits)[:, None]), batch, None
    )
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits[:17]), torch.tensor(right[:17]), pos_weight=torch.tensor(3.0)
    )
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(float(expected), rel=1e-6)


def write_rows(folder: Path, relevance: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    queries, passages = ("red cat", "blue fish"), ("the cat sleeps", "a fish sings", "the old house", "a tree")
    lines = [
        {"query": queries[i % 2], "passage": passages[i // 2 % 4], "relevance": n} for i, n in enumerate(relevance)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


NAMES = [
    "task.name=reranking",
    "data.text=query",
    "data.text_pair=passage",
    "data.label=relevance",
    "data.max_length=12",
]


def test_pairs_are_trained_on_scored_answered_and_exported(tmp_path: Path, capsys: Capture) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    data = write_rows(tmp_path, [1, 0, 0, 1, 0.5, 0, 0, 0])
    source = make_folder(tmp_path / "source", None)
    code, out, err = run(
        capsys, "train", f"model.init={source}", *NAMES, f"data.train={data}", f"data.eval={data}", "train.batch_size=8",
        "train.steps=4", "optim.learning_rate=5e-3", "optim.warmup_steps=0", "train.compilation_cache=null",
        f"train.out={tmp_path / 'run'}", "eval.every=4", "log.progress=off", "task.at=3",
    )  # fmt: skip
    assert code == 0, err
    assert "NDCG@3" in out
    exported = tmp_path / "run/export"

    code, out, err = run(capsys, "predict", exported, "--text", "red cat", "--pair", "a tree", "task.name=reranking")
    assert code == 0, err
    score = json.loads(out)["score"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval()
    words = transformers.AutoTokenizer.from_pretrained(exported)
    with torch.no_grad():
        expected = torch.sigmoid(theirs(**words("red cat", "a tree", return_tensors="pt")).logits)
    assert score == pytest.approx(float(expected), abs=1e-5)

    told = tmp_path / "told.jsonl"
    code, out, err = run(capsys, "eval", tmp_path / "run", "--rows", told)
    assert code == 0, err
    judged = [json.loads(line) for line in told.read_text().splitlines()]
    assert [row["true"] for row in judged] == [1, 0, 0, 1, 0.5, 0, 0, 0]
    for query in ("red cat", "blue fish"):
        mine = sorted((row for row in judged if row["text"] == query), key=lambda row: row["place"])
        assert [row["place"] for row in mine] == [1, 2, 3, 4]
        assert [row["score"] for row in mine] == sorted((row["score"] for row in mine), reverse=True)


@pytest.mark.parametrize(
    ("relevance", "settings", "said"),
    [
        ([1, 0, 3, 0], [], ":3: column 'relevance' holds 3; how relevant a passage is must be a number from 0 to 1"),
        ([1, 0, -1, 0], [], "must be a number from 0 to 1"),
        ([1, "high"], [], "holds 'high', which is no number"),
        ([1, 0], ["task.at=0"], "task.at=0: must be at least 1"),
        ([1, 0], ["task.positive_weight=0"], "task.positive_weight=0.0: must be above 0"),
        ([1, 0], ["data.text_pair=null"], "reranking reads a query and a passage"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, capsys: Capture, relevance: list[Any], settings: list[str], said: str
) -> None:
    data = write_rows(tmp_path, relevance)
    message = refusal(
        capsys, "train", f"model.init={make_folder(tmp_path / 'source', None)}", *NAMES, f"data.train={data}",
        f"data.eval={data}", f"train.out={tmp_path / 'no'}", *settings,
    )  # fmt: skip
    assert said in message


def test_queries_without_an_answer_are_counted(tmp_path: Path, capsys: Capture) -> None:
    data = write_rows(tmp_path, [1, 0, 0])
    code, out, err = run(
        capsys,
        "data",
        f"model.init={make_folder(tmp_path / 'source', None)}",
        *NAMES,
        f"data.train={data}",
        f"data.eval={data}",
    )
    assert code == 0, err
    assert (
        "train: of 2 queries, 1 have no passage that answers (they are not scored) and 1 have one passage alone" in out
    )


@pytest.mark.parametrize("task", ["reranking", "regression"])
def test_the_head_of_a_folder_is_trained_further_whatever_its_number_is_called(tmp_path: Path, task: str) -> None:
    source = make_folder(tmp_path / "source", "classification", num_labels=1, labels=("LABEL_0",))
    data, notes = write_rows(tmp_path, [1, 0, 0, 1, 0.5, 0, 0, 0]), list[str]()
    names = [f"task.name={task}", *NAMES[1:], f"data.train={data}", f"data.eval={data}"]
    config = load_config(None, [f"model.init={source}", *names, "train.batch_size=8", "train.steps=1"])
    ready = prepare(config, notes.append, Times())
    assert "the checkpoint's head is kept" in notes
    kept = paths_of(ready.start_params(0, notes.append))["head/linear/kernel"]
    assert np.array_equal(kept, load_file(source / "model.safetensors")["classifier.weight"].T)
