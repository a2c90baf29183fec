"""What predict and eval write: rows in the input's format and order, thresholds, scores of two and of many classes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file, save_file
from tiny import make_folder, refusal, rows, run, write_csv

from jaxft.models.contract import Output
from jaxft.reporting.report import report_text, write_report
from jaxft.tasks.classification import MOST_CONFUSION_CLASSES, Task

Capture = pytest.CaptureFixture[str]
LABELS = ("no", "yes")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of two classes, and 40 rows with a column of ids."""
    folder = tmp_path_factory.mktemp("home")
    make_folder(folder / "model", "classification", LABELS, num_hidden_layers=1)
    table = [(str(i), text, LABELS[label == "thing"]) for i, (text, label) in enumerate(rows(40))]
    write_csv(folder / "rows.csv", table, ("id", "text", "label"))
    return folder


def table_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        if path.suffix == ".tsv":
            header, *lines = file.read().splitlines()
            return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
        return list(csv.DictReader(file))


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predict_writes_tables_with_the_columns_of_the_input(home: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        code, out, err = run(capsys, "predict", home / "model", home / "rows.csv", "--out", tmp_path / name)
        assert (code, out, err) == (0, "", "")
    given, found = table_of(home / "rows.csv"), table_of(tmp_path / "a.csv")
    assert list(found[0]) == ["id", "text", "label", "predicted", "probability", "probability_no", "probability_yes"]
    assert [{name: row[name] for name in given[0]} for row in found] == given
    assert table_of(tmp_path / "a.tsv") == found
    for row, record in zip(found, records_of(tmp_path / "a.jsonl"), strict=True):
        assert list(record) == ["text", "label", "probability", "probabilities", "true", "id"]
        assert (record["true"], record["id"], record["label"]) == (row["label"], row["id"], row["predicted"])
        assert record["probabilities"][row["predicted"]] == record["probability"] == float(row["probability"])
        assert float(row["probability"]) == max(float(row["probability_no"]), float(row["probability_yes"]))
    # Answers may be answered again: columns of the input give way.
    assert run(capsys, "predict", home / "model", tmp_path / "a.csv", "--out", tmp_path / "b.csv")[0] == 0
    assert [row["input_predicted"] for row in table_of(tmp_path / "b.csv")] == [row["predicted"] for row in found]
    assert run(capsys, "predict", home / "model", "--text", "the cat", "--out", tmp_path / "c.csv")[0] == 0
    assert list(table_of(tmp_path / "c.csv")[0])[:2] == ["text", "predicted"]


def test_columns_that_are_carried_may_hold_anything(home: Path, tmp_path: Path, capsys: Capture) -> None:
    lines = [
        {"text": "a cat", "n": 1},
        {"text": "the dog", "tags": ["x"], "n": None},
        {"text": "a tree", "label": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(capsys, "predict", home / "model", tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl")[0] == 0
    assert [record["n"] for record in records_of(tmp_path / "b.jsonl")] == [1, None, None]
    made = pyarrow.table({"tags": [["x", "y"], None], "text": ["a cat", "the dog"], "score": [math.nan, 1.5]})
    pyarrow.parquet.write_table(made, tmp_path / "a.parquet")
    assert run(capsys, "predict", home / "model", tmp_path / "a.parquet", "--out", tmp_path / "b.csv")[0] == 0
    assert [row["tags"] for row in table_of(tmp_path / "b.csv")] == ['["x", "y"]', ""]
    out = run(capsys, "predict", home / "model", tmp_path / "a.parquet")[1]
    assert [json.loads(line, parse_constant=None)["score"] for line in out.splitlines()] == [None, 1.5]
    assert "NaN" not in out


def test_a_table_that_cannot_be_written_leaves_nothing(home: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a cat"}\n{"text": "a\\tdog"}\n')
    message = refusal(capsys, "predict", home / "model", tmp_path / "a.jsonl", "--out", tmp_path / "b.tsv")
    assert "a cell has a tab or a line break, which TSV cannot hold; write .csv or .jsonl" in message
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert "--top is for JSON Lines" in refusal(
        capsys, "predict", home / "model", "--text", "a", "--out", tmp_path / "b.csv", "--top", "1"
    )


def test_eval_writes_each_row(home: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("eval", home / "model", f"data.eval={home / 'rows.csv'}", "eval.batch_size=7", "--out", tmp_path)
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        code, out, _ = run(capsys, *arguments, "--rows", tmp_path / name)
        assert code == 0
        assert f"wrote {tmp_path / name}" in out
    given, found = table_of(home / "rows.csv"), table_of(tmp_path / "a.csv")
    assert list(found[0]) == ["text", "true", "predicted", "probability", "right"]
    assert [(row["text"], row["true"]) for row in found] == [(row["text"], row["label"]) for row in given]
    assert table_of(tmp_path / "a.tsv") == found
    records = records_of(tmp_path / "a.jsonl")
    assert [record["right"] for record in records] == [row["true"] == row["predicted"] for row in found]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert np.mean([record["right"] for record in records]) == metrics["accuracy"]
    worst = table_of(tmp_path / "errors.csv")
    assert [float(row["probability"]) for row in worst] == sorted(
        (float(r["probability"]) for r in worst), reverse=True
    )
    assert sorted(map(str, worst)) == sorted(str(row) for row in found if row["right"] == "false")
    # The same as predict says.
    assert run(capsys, "predict", home / "model", home / "rows.csv", "--out", tmp_path / "p.csv")[0] == 0
    for row, other in zip(found, table_of(tmp_path / "p.csv"), strict=True):
        assert row["predicted"] == other["predicted"]
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)


def test_thresholds_and_ranking(home: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("eval", home / "model", f"data.eval={home / 'rows.csv'}", "--out", tmp_path)
    out = run(capsys, *arguments)[1]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert run(capsys, "predict", home / "model", home / "rows.csv", "--out", tmp_path / "p.csv")[0] == 0
    table = table_of(tmp_path / "p.csv")
    scored = [(float(row["probability_yes"]), row["label"] == "yes") for row in table]
    pairs = [(a, b) for a, up in scored if up for b, other in scored if not other]
    assert metrics["auroc"] == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs), abs=0.01)
    shown = f"AUROC {metrics['auroc']:.4f} average precision {metrics['average_precision']:.4f}"
    assert shown in " ".join(out.split())
    best = metrics["best_threshold"]
    assert f"Best F1 of yes: {best['f1']:.4f}" in out
    assert metrics["positive"] == "yes"
    run(capsys, *arguments, "--threshold", best["threshold"])
    at_best = json.loads((tmp_path / "metrics.json").read_text())
    assert at_best["classes"]["yes"]["f1"] == pytest.approx(best["f1"])
    assert at_best["classes"]["yes"]["f1"] >= metrics["classes"]["yes"]["f1"]
    assert (at_best["auroc"], at_best["loss"]) == (metrics["auroc"], metrics["loss"])
    run(capsys, "predict", home / "model", home / "rows.csv", "--out", tmp_path / "t.csv", "--threshold", 0.9)
    for row in table_of(tmp_path / "t.csv"):
        yes = float(row["probability_yes"]) >= 0.9
        assert row["predicted"] == ("yes" if yes else "no")
        assert row["probability"] == row["probability_yes" if yes else "probability_no"]
    assert "must lie in 0..1" in refusal(capsys, "predict", home / "model", "--text", "a", "--threshold", "2")
    assert f"{home / 'model'} has no thresholds.json" in refusal(
        capsys, "predict", home / "model", "--text", "a", "--threshold", "best"
    )
    row = metrics["thresholds"]["labels"]["yes"]
    assert (row["threshold"], row["f1"]) == (best["threshold"], pytest.approx(best["f1"]))
    assert f"{row['f1_at_half']:.4f} at 0.5" in out


def test_rows_of_one_class_have_no_rank(home: Path, tmp_path: Path, capsys: Capture) -> None:
    write_csv(tmp_path / "one.csv", [(text, "no") for text, _ in rows(5)])
    code, out, _ = run(capsys, "eval", home / "model", f"data.eval={tmp_path / 'one.csv'}", "--out", tmp_path)
    assert code == 0
    assert "AUROC n/a average precision n/a" in " ".join(out.split())
    assert "No AUROC, average precision: all rows are of one class." in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["auroc"], metrics["average_precision"], metrics["best_threshold"]) == (None, None, None)


def test_a_model_that_gives_no_numbers_is_said_so(home: Path, tmp_path: Path, capsys: Capture) -> None:
    make_folder(tmp_path / "model", "classification", LABELS, num_hidden_layers=1)
    weights = tmp_path / "model/model.safetensors"
    tensors = load_file(str(weights))
    save_file(tensors | {"classifier.bias": tensors["classifier.bias"] * np.nan}, str(weights))
    code, out, err = run(capsys, "predict", tmp_path / "model", "--text", "a cat")
    record = json.loads(out)
    assert (code, record["label"], record["probability"]) == (0, None, None)
    assert record["probabilities"] == {"no": None, "yes": None}
    assert "1 of 1 texts have no label: the model's probabilities are NaN" in err
    data = f"data.eval={home / 'rows.csv'}"
    code, out, _ = run(capsys, "eval", tmp_path / "model", data, "--rows", tmp_path / "r.jsonl", "--out", tmp_path)
    assert code == 0
    assert "loss n/a" in out
    assert json.loads((tmp_path / "metrics.json").read_text())["loss"] is None
    assert records_of(tmp_path / "r.jsonl")[0]["predicted"] is None


def test_classes_of_one_name_are_refused(tmp_path: Path, capsys: Capture) -> None:
    folder = make_folder(tmp_path / "model", "classification", LABELS, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "caf\u00e9", "1": "cafe\u0301"}}))
    assert "classes 0 and 1 have the same name" in refusal(capsys, "predict", folder, "--text", "a cat")


def test_ids_get_names(tmp_path: Path, capsys: Capture) -> None:
    make_folder(tmp_path / "base", num_hidden_layers=1)
    write_csv(tmp_path / "a.csv", [(text, str(i % 2)) for i, (text, _) in enumerate(rows(24))])
    settings = [
        *("data.max_length=16", "data.buckets=[16]", "train.batch_size=8", "eval.batch_size=8", "log.progress=off"),
        *("train.steps=2", "train.compilation_cache=null", f"train.out={tmp_path}/run", f"model.init={tmp_path}/base"),
        *(f"data.train={tmp_path}/a.csv", f"data.eval={tmp_path}/a.csv", "data.labels={0: negative, 1: positive}"),
    ]
    code, out, err = run(capsys, "train", *settings)
    assert (code, err) == (0, "")
    assert "labels: negative, positive" in out
    assert "held-out metrics identical" in out
    config = json.loads((tmp_path / "run/export/config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(metrics["classes"]) == {"negative", "positive"}
    code, out, _ = run(capsys, "eval", tmp_path / "run", "--out", tmp_path)  # the run's own data, with ids
    assert code == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] == metrics["accuracy"]
    assert json.loads(run(capsys, "predict", tmp_path / "run", "--text", "a cat")[1])["label"] in (
        "negative",
        "positive",
    )
    data = f"data.eval={tmp_path}/a.csv"
    message = refusal(capsys, "eval", tmp_path / "run/export", data)
    assert "if the labels are class ids: data.labels={0: negative, 1: positive}" in message
    code, out, _ = run(
        capsys, "eval", tmp_path / "run/export", data, "data.labels={1: positive, 0: negative}", "data.max_length=16"
    )
    assert code == 0
    assert f"accuracy {metrics['accuracy']:.4f}" in out


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (
            [f"the cat,{i / 7:.3f}" for i in range(60)],
            "",
            "60 different numbers such as 0.143, 0.286, 0.429 look like scores",
        ),
        ([" ,a", ",b"], "", "all of its 2 texts are empty (column 'text', data.text)"),
        (["cat,a", "dog,b"], "data.labels=[a,a]", "data.labels=('a', 'a'): has a label twice"),
        (["cat,a", "dog,b"], "data.labels=[1,1.0]", "data.labels"),
        (["cat,a", "dog,c"], "data.labels={a: x, b: y}", "t.csv:3: unknown label 'c': valid names: a, b"),
        (["cat,a", "dog,b"], "data.labels=[]", "data.labels=(): names no label"),
    ],
)
def test_rows_that_are_no_classes(tmp_path: Path, capsys: Capture, lines: list[str], more: str, message: str) -> None:
    make_folder(tmp_path / "base", num_hidden_layers=1)
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"{line}\n" for line in lines))
    data = [f"model.init={tmp_path}/base", f"data.train={tmp_path}/t.csv", f"data.eval={tmp_path}/t.csv"]
    given = [*data, "train.compilation_cache=null", f"train.out={tmp_path}/run", *([more] if more else [])]
    assert message in refusal(capsys, "train", *given)
    assert not (tmp_path / "run").exists()


def test_no_matrix_is_made_of_many_classes(tmp_path: Path) -> None:
    count = MOST_CONFUSION_CLASSES + 100
    task, rng = Task(tuple(f"class {i}" for i in range(count))), np.random.default_rng(0)
    batch = {"labels": jax.ShapeDtypeStruct((8,), np.int32), "weights": jax.ShapeDtypeStruct((8,), np.float32)}
    logits = jax.ShapeDtypeStruct((8, count), np.float32)
    jaxpr = jax.make_jaxpr(lambda x, b: task.sums(lambda batch, key: Output(x, logits=x), b, None))(logits, batch)
    assert max(math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars) == 8 * count
    true = rng.integers(0, count, 5000)
    predicted = np.where(rng.random(5000) < 0.5, true, rng.integers(0, count, 5000))
    confusion = np.zeros((count, count))
    np.add.at(confusion, (true, predicted), 1)
    sums: dict[str, Any] = {"true": confusion.sum(1), "predicted": confusion.sum(0), "correct": np.diag(confusion)}
    metrics = task.score({"loss": np.asarray(1.0), "weight": np.asarray(1.0), **sums})
    with_matrix = task.score({"loss": np.asarray(1.0), "weight": np.asarray(1.0), "confusion": confusion, **sums})
    assert metrics == {name: value for name, value in with_matrix.items() if name != "confusion"}
    assert metrics["accuracy"] == (true == predicted).mean()
    f1 = [2 * confusion[i, i] / (confusion[i].sum() + confusion[:, i].sum()) for i in range(count)]
    assert metrics["macro_f1"] == pytest.approx(np.mean(f1))
    assert [path.name for path in write_report(tmp_path, metrics, task.labels, [])] == ["metrics.json"]
    text = report_text(metrics, task.labels, [])
    assert f"The 20 classes with the lowest F1 of {count}, those of most rows first" in text
    assert len(text.splitlines()) < 30


@pytest.mark.parametrize(
    ("metric", "mode", "wrong"), [("accuracy", "max", ""), ("loss", "max", "highest loss"), ("loss", "min", "")]
)
def test_runs_of_versions_with_eval_mode_are_served(
    tmp_path: Path, capsys: Capture, metric: str, mode: str, wrong: str
) -> None:
    make_folder(tmp_path / "run/export", "classification", LABELS, num_hidden_layers=1)
    stored = f"eval: {{metric: {metric}, mode: {mode}, patience: null}}\ndata: {{max_length: 16}}\n"
    (tmp_path / "run/config.yaml").write_text(stored)
    code, out, err = run(capsys, "predict", tmp_path / "run", "--text", "a cat")
    assert code == 0, err
    assert json.loads(out)["label"] in LABELS
    assert (wrong and f"kept the checkpoint of the {wrong}, its worst" in err) or (not wrong and err == "")
    # A run file, and an override, are today's.
    assert "eval.mode is gone" in refusal(capsys, "show-config", tmp_path / "run/config.yaml")
    assert "eval.mode is gone" in refusal(capsys, "predict", tmp_path / "run", "--text", "a cat", f"eval.mode={mode}")


def test_a_mesh_changes_no_answer(home: Path, tmp_path: Path, capsys: Capture) -> None:
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    for name, more in (("one", ()), ("many", mesh)):
        arguments = ("eval", home / "model", f"data.eval={home / 'rows.csv'}", "--out", tmp_path / name, *more)
        assert run(capsys, *arguments)[0] == 0
        asked = ("predict", home / "model", home / "rows.csv", "--out", tmp_path / f"{name}.csv", *more)
        assert run(capsys, *asked)[0] == 0
    one, many = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "many"))
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert many["confusion"] == one["confusion"]
    for row, other in zip(table_of(tmp_path / "one.csv"), table_of(tmp_path / "many.csv"), strict=True):
        assert row["predicted"] == other["predicted"]
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)
    problem = refusal(capsys, "eval", home / "model", f"data.eval={home / 'rows.csv'}", "eval.batch_size=6", *mesh)
    assert problem == "eval.batch_size=6 cannot be split 4 ways (mesh slices x data x fsdp); choose a multiple"
    assert "does not fit 8 devices" in refusal(capsys, "predict", home / "model", "--text", "a", "mesh.data=3")


def test_folders_of_plain_texts_are_answered(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("one/a.txt", "the cat"), ("two/b.txt", "a dog")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text + "\n")
    code, out, _ = run(capsys, "predict", home / "model", tmp_path / "one", tmp_path / "two")
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["the cat", "a dog"]
    assert "columns 'text', 'stars' are wanted" in refusal(
        capsys, "eval", home / "model", f"data.eval={tmp_path / 'one/a.txt'}", "data.label=stars"
    )
