"""Any number of labels for each text: losses as torch's, scores as scikit-learn's, runs, caches, answers, exports, and bad rows."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import make_folder, refusal, run, write_tokenizer

from jaxft.config import load_config
from jaxft.data.encode import read_rows
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.models.contract import Output
from jaxft.tasks import collected, multi_label
from jaxft.tasks.multi_label import Task
from jaxft.training.setup import Times, prepare
from jaxft.trees import paths_of

Capture = pytest.CaptureFixture[str]
NAMES = ("a", "b", "c", "d", "e")


def _output(made: Output, batch: Any, key: Any) -> Output:
    return made


def scores(logits: np.ndarray, labels: np.ndarray, task: Task, weights: np.ndarray | None = None) -> dict[str, Any]:
    """Scores of logits [N, C], from three batches."""
    weights, parts = np.ones(len(logits)) if weights is None else weights, []
    for some in np.array_split(np.arange(len(logits)), 3):
        batch = {
            "labels": jnp.asarray(labels[some], jnp.int32),
            "weights": jnp.asarray(weights[some], jnp.float32),
        }
        made = Output(jnp.zeros((1, 1, 1)), logits=jnp.asarray(logits[some], jnp.float32))
        forward = partial(_output, made)
        parts.append((task.sums(forward, batch, None), task.outputs(forward, batch)))
    return task.score(*collected(parts))


@pytest.mark.parametrize(
    "kind", ["random", "ties", "a label that is never there", "nothing predicted", "no labels at all"]
)
def test_scores_are_those_of_scikit_learn(kind: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(90, 5)).astype(np.float32) * 2, (rng.random((90, 5)) < 0.3).astype(int)
    if kind == "ties":
        logits = logits.round()
    if kind == "a label that is never there":
        labels[:, 2] = 0
    if kind == "nothing predicted":
        logits -= 100
    if kind == "no labels at all":
        labels[:] = 0
    found, said = scores(logits, labels, Task(NAMES)), (logits >= 0).astype(int)
    for average in ("micro", "macro", "samples"):
        expected = metrics.f1_score(labels, said, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected, abs=1e-7 if average == "samples" else 1e-9)
    assert found["exact_match"] == pytest.approx(metrics.accuracy_score(labels, said))
    assert found["hamming_loss"] == pytest.approx(metrics.hamming_loss(labels, said))
    both = [i for i in range(5) if 0 < labels[:, i].sum() < 90]
    for name, theirs in (("auroc", metrics.roc_auc_score), ("average_precision", metrics.average_precision_score)):
        each = [theirs(labels[:, i], logits[:, i]) for i in both]
        for i, value in zip(both, each, strict=True):
            assert found["classes"][NAMES[i]][name] == pytest.approx(value, abs=1e-9)
        if both:
            assert found[f"macro_{name}"] == pytest.approx(np.mean(each), abs=1e-9)
        else:
            assert math.isnan(found[f"macro_{name}"])


@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0, 0.0, 9.0)])
def test_the_loss_is_torchs(weights: tuple[float, ...] | None) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(20, 5)).astype(np.float32) * 30, rng.integers(0, 2, (20, 5))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits[:17]),
        torch.tensor(labels[:17], dtype=torch.float32),
        pos_weight=None if weights is None else torch.tensor(weights),
    )
    found = scores(logits, labels, Task(NAMES, weights), (np.arange(20) < 17).astype(float))
    assert found["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert found["rows"] == 17


def write_rows(path: Path, labels: list[Any]) -> Path:
    lines = [{"text": "the cat" if i % 2 else "a dog sleeps", "tags": one} for i, one in enumerate(labels)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


SHORT = [
    "data.packing=none", "train.batch_size=8", "train.steps=6", "optim.learning_rate=5e-3", "optim.warmup_steps=0",
    "train.compilation_cache=null", "eval.every=6", "log.progress=off", "task.class_weights=balanced",
]  # fmt: skip
TAGS = [["pet", "small"], [], ["small"], ["pet"], "pet", ["old", "pet"], ["small", "small"], []]


def settings(data: Path) -> list[str]:
    return ["task.name=multi_label", f"data.train={data}", f"data.eval={data}", "data.label=tags", "data.max_length=12"]


def test_rows_are_trained_on_scored_answered_and_exported(tmp_path: Path, capsys: Capture) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    data = write_rows(tmp_path / "rows.jsonl", TAGS)
    about = [
        "task.name=multi_label",
        f"data.train={data}",
        f"data.eval={data}",
        "data.label=tags",
        "data.max_length=12",
    ]
    source = make_folder(tmp_path / "source", None)
    (source / "thresholds.json").write_text("of other weights")
    code, trained, err = run(capsys, "train", f"model.init={source}", *about, *SHORT, f"train.out={tmp_path / 'run'}")
    assert code == 0, err
    assert "labels: old, pet, small" in trained
    assert "only one training row has label old" in trained
    assert "samples F1" in trained
    exported = tmp_path / "run/export"
    config = json.loads((exported / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["old", "pet", "small"]

    code, out, err = run(capsys, "predict", exported, "--text", "the cat", "--threshold", "0.3")
    assert code == 0, err
    said = json.loads(out)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval()
    words = transformers.AutoTokenizer.from_pretrained(exported)
    with torch.no_grad():
        expected = torch.sigmoid(theirs(**words("the cat", return_tensors="pt")).logits)[0].tolist()
    by_name = dict(zip(("old", "pet", "small"), expected, strict=True))
    assert said["probabilities"] == pytest.approx(by_name, abs=2e-6)
    assert said["labels"] == [name for name, p in by_name.items() if p >= 0.3]

    told = tmp_path / "told.csv"
    code, out, err = run(capsys, "eval", tmp_path / "run", "--rows", told)
    assert code == 0, err
    lines = told.read_text().splitlines()
    assert lines[0] == "text,true,predicted,right,wrong"
    assert [line.split(",")[1] for line in lines[1:]] == [
        "pet|small",
        "",
        "small",
        "pet",
        "pet",
        "old|pet",
        "small",
        "",
    ]

    # The thresholds of the report lie beside the weights, and give on its rows what it says.
    report = json.loads((tmp_path / "run/metrics.json").read_text())["thresholds"]["labels"]
    kept = json.loads((exported / "thresholds.json").read_text())
    assert kept["thresholds"] == {name: row["threshold"] for name, row in report.items()}
    code, _, err = run(capsys, "eval", tmp_path / "run", "--threshold", "best", "--out", tmp_path)
    assert code == 0, err
    again = json.loads((tmp_path / "metrics.json").read_text())["classes"]
    assert {name: row["f1"] for name, row in again.items()} == pytest.approx(
        {name: row["f1"] for name, row in report.items()}
    )
    code, out, err = run(capsys, "predict", exported, "--text", "the cat", "--threshold", "best")
    assert code == 0, err
    assert json.loads(out)["labels"] == [name for name, p in by_name.items() if p >= kept["thresholds"][name]]


@pytest.mark.slow  # two more runs
def test_a_token_cache_holds_the_same_rows(tmp_path: Path, capsys: Capture) -> None:
    data = write_rows(tmp_path / "rows.jsonl", TAGS)
    about, source = settings(data), make_folder(tmp_path / "source", None)
    code, _, err = run(capsys, "cache", "build", "--out", tmp_path / "cache", f"model.init={source}", *about)
    assert code == 0, err
    cached = [f"data.train={tmp_path / 'cache/train'}", f"data.eval={tmp_path / 'cache/eval'}"]
    ends = []
    for number, more in enumerate(([], cached)):
        out = f"train.out={tmp_path / str(number)}"
        code, trained, err = run(capsys, "train", f"model.init={source}", *about, *SHORT, *more, out)
        assert code == 0, err
        ends.append(re.findall(r"^eval +6/6 .*$", trained, re.M))
    assert ends[0]
    assert ends[0] == ends[1]


def test_one_text_may_hold_several_labels(tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "rows.csv"
    data.write_text('text,label\nthe cat,"pet, small"\na dog,pet\nthe bird,\nthe fish,old\n')
    message = refusal(
        capsys, "train", f"model.init={make_folder(tmp_path / 'source', None)}", "task.name=multi_label",
        f"data.train={data}", f"data.eval={data}", f"train.out={tmp_path / 'no'}", "task.separator=,",
    )  # fmt: skip
    assert "rows.csv:4: column 'label' is empty" in message


@pytest.mark.parametrize(
    ("labels", "settings", "said"),
    [
        ([["pet"], ["pat"]], ["data.labels=[pet, small]"], "unknown label 'pat': did you mean 'pet'?"),
        ([[], []], [], "no row has a label"),
        ([["pet"], [{"start": 0}]], [], "expected a list of labels"),
        (
            [["pet"], ["old"]],
            ["task.class_weights={pat: 2}"],
            "task.class_weights.pat: unknown label: did you mean 'pet'?",
        ),
        ([["pet"], ["old"]], ["task.class_weights={pet: -2}"], "a weight must be a number that is not negative"),
        ([["pet"], ["old"]], ["task.threshold=1.5"], "task.threshold=1.5: must lie between 0 and 1"),
        ([["pet"], None], [], "every row needs a label"),
    ],
)
def test_bad_rows_and_settings_are_one_line(
    tmp_path: Path, capsys: Capture, labels: list[Any], settings: list[str], said: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labels)
    message = refusal(
        capsys, "train", f"model.init={make_folder(tmp_path / 'source', None)}", "task.name=multi_label", "data.label=tags",
        f"data.train={data}", f"data.eval={data}", f"train.out={tmp_path / 'no'}", *settings,
    )  # fmt: skip
    assert said in message


def test_labels_are_renamed_and_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,x|y\nb,X\nc,z\nd,x|z|w\n")
    mapping = "data.label_map={X: x, z: null, y: why, no: none}"
    config = load_config(None, ["task.name=multi_label", "task.separator='|'", f"data.train={path}", mapping])
    notes: list[str] = []
    rows = read_rows(str(path), config.data, multi_label.columns(config), notes.append)
    targets = multi_label.study(rows, config, None, notes.append)
    assert targets.labels == ("w", "why", "x")
    write_tokenizer(tmp_path)
    made = multi_label.encode(rows, Tokenizer(tmp_path, 8), targets, config)
    assert [one.example["labels"].tolist() for one in made] == [[0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert [note.removeprefix(f"{path}: data.label_map: ") for note in notes if "label_map" in note] == [
        "'X' is 'x' in 1 rows", "'z' is taken off 2 rows", "'y' is 'why' in 1 rows", "'no' is 'none' in 0 rows",
    ]  # fmt: skip


@pytest.mark.parametrize("head", ["fresh", "stored"])
def test_a_fresh_head_begins_at_how_common_labels_are(tmp_path: Path, head: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", TAGS)
    names = ("old", "pet", "small")
    source = make_folder(
        tmp_path / "source", "classification" if head == "stored" else None, labels=names if head == "stored" else None,
        source_config={"problem_type": "multi_label_classification"},
    )  # fmt: skip
    config = load_config(
        None, [f"model.init={source}", *settings(data), "mesh.data=8", "train.batch_size=8", "train.steps=1"]
    )
    ready = prepare(config, lambda line: None, Times())
    bias = paths_of(ready.start_params(0, lambda line: None))["head/linear/bias"]
    if head == "stored":
        assert np.array_equal(bias, load_file(source / "model.safetensors")["classifier.bias"])
        return
    counts = np.array([1, 4, 3])  # of 8 rows
    np.testing.assert_allclose(bias, np.log((counts + 1) / (8 - counts + 1)), rtol=1e-6)
    task: Any = ready.task
    assert task.head_bias == pytest.approx(bias.tolist(), rel=1e-6)
