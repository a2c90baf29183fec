"""The command line, end to end, as its users type it: train, eval, predict, in every data format."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny import LABELS, make_folder, refusal, rows, run, write_csv

import jaxft

pytestmark = pytest.mark.usefixtures("painted")
Capture = pytest.CaptureFixture[str]
USUAL = [
    "data.max_length=16",
    "data.buckets=[16]",
    "train.batch_size=16",
    "train.log_every=1",
    "train.compilation_cache=null",
    "eval.batch_size=8",
    "eval.every=4",  # of 4 steps: the last is the best
    "log.progress=off",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in it: trained from CSV, labels in an order of the user's."""
    from jaxft.__main__ import main

    folder = tmp_path_factory.mktemp("home")
    make_folder(folder / "base", num_hidden_layers=1)
    make_folder(folder / "bare", num_hidden_layers=1)
    write_csv(folder / "train.csv", rows(40))
    write_csv(folder / "eval.csv", rows(21, seed=1))
    write_csv(folder / "test.csv", rows(13, seed=2))
    at = [f"model.init={folder}/base", *(f"data.{name}={folder}/{name}.csv" for name in ("train", "eval", "test"))]
    assert main(["train", *USUAL, *at, "data.labels=[thing,animal]", "train.steps=4", f"train.out={folder}/run"]) == 0
    return folder


def test_eval_on_a_token_cache_is_eval_on_its_rows(home: Path, tmp_path: Path, capsys: Capture) -> None:
    code, _, _ = run(capsys, "cache", "build", home / "run/config.yaml", "--out", tmp_path / "caches")
    assert code == 0
    cache = f"data.eval={tmp_path / 'caches/eval'}"
    code, said, _ = run(capsys, "eval", home / "run", f"data.eval={home / 'eval.csv'}")
    assert code == 0
    assert run(capsys, "eval", home / "run", cache)[:2] == (0, said)
    assert "which holds no texts" in refusal(capsys, "eval", home / "run", cache, "--rows", tmp_path / "rows.csv")
    # The order of the labels is the model's, and the user's.
    usual = ["cache", "build", home / "run/config.yaml", "data.labels=null", "--out", tmp_path / "other"]
    assert run(capsys, *usual)[0] == 0
    told = refusal(capsys, "eval", home / "run", f"data.eval={tmp_path / 'other/eval'}")
    assert "a token cache with labels ['animal', 'thing'], the model has ['thing', 'animal']" in told


def _records(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def test_run_folder(home: Path) -> None:
    written = {path.name for path in (home / "run").iterdir()}
    assert {"config.yaml", "log.jsonl", "metrics.json", "confusion.png", "checkpoints", "export"} <= written
    config = json.loads((home / "run/export/config.json").read_text())
    assert config["id2label"] == {"0": "thing", "1": "animal"}
    assert config["label2id"] == {"thing": 0, "animal": 1}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_the_same_rows_in_every_format_make_the_same_model(home: Path, tmp_path: Path, capsys: Capture) -> None:
    """Data are read to the same batches; so no second training is needed to know it."""
    from jaxft.config import DataConfig
    from jaxft.data.encode import read_rows

    table = rows(40)
    write_csv(tmp_path / "a.tsv", table)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in table))
    columns = {"text": [t for t, _ in table], "label": [label for _, label in table]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    expected = [row.values for row in read_rows(str(home / "train.csv"), DataConfig())]
    for name in ("a.tsv", "a.jsonl", "a.parquet"):
        assert [row.values for row in read_rows(str(tmp_path / name), DataConfig())] == expected


def test_pairs_from_parquet_to_jsonl(home: Path, tmp_path: Path, capsys: Capture) -> None:
    table = rows(32)
    columns = {"one": [t for t, _ in table], "two": [t[:9] for t, _ in table], "label": [i % 3 for i in range(32)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    lines = [{"one": t, "two": t[:9], "label": i % 3} for i, (t, _) in enumerate(table)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run(
        capsys,
        *("train", *USUAL, f"model.init={home}/base", f"data.train={tmp_path}/train.parquet"),
        *(f"data.eval={tmp_path}/eval.jsonl", "data.text=one", "data.text_pair=two", "train.steps=2"),
        f"train.out={tmp_path}/run",
    )
    assert (code, err) == (0, "")
    assert "loaded back: parameters bit-equal" in out
    config = json.loads((tmp_path / "run/export/config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1", "2": "2"}
    code, out, _ = run(capsys, "predict", tmp_path / "run", tmp_path / "eval.jsonl")
    assert code == 0
    assert [record["pair"] for record in _records(out)] == [line["two"] for line in lines]


def compare_scores(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """What is counted is equal; what is a mean of probabilities, of other batches, nearly so."""
    for name in ("loss", "ece", "brier"):
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-5)
    said, wanted = found.pop("calibration"), expected.pop("calibration")
    assert said["temperature"] == pytest.approx(wanted["temperature"], rel=1e-4)
    assert [one["rows"] for one in said["bins"]] == [one["rows"] for one in wanted["bins"]]
    assert found == expected


@pytest.mark.parametrize("what", ["run", "run/checkpoints", "run/checkpoints/4"])
def test_eval_gives_the_metrics_of_the_run(home: Path, tmp_path: Path, capsys: Capture, what: str) -> None:
    """21 rows in batches of 8: the last batch is partial, and counts exactly."""
    code, out, _ = run(capsys, "eval", home / what, "--out", tmp_path)
    assert code == 0
    assert "eval: 21 rows" in out
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, home / "run"))
    compare_scores(found, expected)
    assert found["rows"] == 21


def test_eval_of_the_test_gives_the_scores_of_the_run(home: Path, tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, "eval", home / "run", "--split", "test", "--out", tmp_path)
    assert (code, "test: 13 rows" in out) == (0, True)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("metrics_test.json", "confusion_test.png", "reliability_test.png", "errors_test.csv")
    }
    found, expected = (json.loads((at / "metrics_test.json").read_text()) for at in (tmp_path, home / "run"))
    compare_scores(found, expected)
    assert found["rows"] == 13


def test_eval_finds_the_rows_that_a_run_held_out(home: Path, capsys: Capture) -> None:
    asked = ["eval", home / "run", "data.eval=null", "data.test=null", "data.test_fraction=0.2"]
    code, out, err = run(capsys, *asked, "--split", "test")
    assert (code, "test: 8 rows" in out) == (0, True)
    assert "held out at random: 0.1 for eval, 0.2 for test of each label" in err
    assert "data.test is not set; name the labelled rows" in refusal(capsys, *asked[:-1], "--split", "test")


def test_eval_does_not_depend_on_the_batch_size(home: Path, tmp_path: Path, capsys: Capture) -> None:
    eval_rows = f"data.eval={home}/eval.csv"
    code, out, _ = run(capsys, "eval", home / "run/export", eval_rows, "eval.batch_size=5", "data.max_length=16")
    assert code == 0
    again = run(capsys, "eval", home / "run/export", eval_rows, "eval.batch_size=21", "data.max_length=16")[1]
    assert out == again


def test_predict_is_the_same_from_run_export_and_checkpoint(home: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(home / "run", tmp_path / "unexported")
    shutil.rmtree(tmp_path / "unexported/export")
    text = "the small cat runs over the old road"
    answers = []
    for what in (home / "run", home / "run/export", home / "run/checkpoints/4", tmp_path / "unexported"):
        code, out, err = run(capsys, "predict", what, "--text", text)
        assert (code, err) == (0, "")
        answers += _records(out)
    for answer in answers:
        assert answer["label"] == answers[0]["label"]
        assert answer["probability"] == pytest.approx(answers[0]["probability"], abs=2e-6)
    model, params, tokenizer = jaxft.load(str(home / "run/export"), note=lambda _: None)
    logits = np.asarray(model.apply({"params": params}, **tokenizer([text])).logits, np.float64)[0]
    expected = np.exp(logits) / np.exp(logits).sum()
    found = answers[0]["probabilities"]
    assert isinstance(found, dict)
    assert [found["thing"], found["animal"]] == pytest.approx(expected.tolist(), abs=2e-6)


def test_predict_keeps_the_order_of_mixed_lengths(home: Path, tmp_path: Path, capsys: Capture) -> None:
    table = rows(70, seed=3)
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text, _ in table))
    write_csv(tmp_path / "a.tsv", table)
    code, out, err = run(capsys, "predict", home / "run", tmp_path / "a.txt", "--batch-size", "4")
    assert code == 0
    records = _records(out)
    assert [record["text"] for record in records] == [text for text, _ in table]
    cut = sum(len(text.split()) > 14 for text, _ in table)
    assert cut > 0
    assert f"{cut} of 70 texts were truncated to 16 tokens" in err
    target = tmp_path / "made.jsonl"
    assert run(capsys, "predict", home / "run", tmp_path / "a.tsv", "--out", target, "--top", "1")[:2] == (0, "")
    single = _records(target.read_text())
    for record, other in zip(records, single, strict=True):
        assert record["label"] == other["label"]
        assert record["probability"] == pytest.approx(other["probability"], abs=2e-6)
    chosen: list[Any] = [record["probabilities"] for record in single]
    assert all(len(probabilities) == 1 for probabilities in chosen)


def test_options_and_overrides_may_be_mixed(home: Path, capsys: Capture) -> None:
    code, _, err = run(
        capsys, "predict", home / "run", "--text", "the cat runs very fast", "data.max_length=4", "--top", "1"
    )
    assert code == 0
    assert "truncated to 4 tokens" in err


def test_a_failed_run_leaves_another_run_as_it_was(home: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    again = [*USUAL, f"model.init={home}/base", f"data.train={home}/train.csv", f"data.eval={home}/eval.csv"]
    more = ["data.labels=[thing,animal]", "train.steps=4", f"train.out={home}/run"]
    message = refusal(capsys, "train", *again, *more, "optim.learning_rate=1e-3")
    assert "holds a run with another configuration: optim.learning_rate was 5e-05, now 0.001" in message
    assert {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()} == before


def test_labels_that_look_like_none(home: Path, tmp_path: Path, capsys: Capture) -> None:
    # config.json writes LABEL_0, LABEL_1, ... where labels have no names; here they are the names.
    named = [(text, f"LABEL_{LABELS.index(label)}") for text, label in rows(24)]
    table = write_csv(tmp_path / "train.csv", named)
    settings = [*USUAL, f"model.init={home}/base", f"data.train={table}", f"data.eval={table}"]
    code, out, err = run(capsys, "train", *settings, "train.steps=4", f"train.out={tmp_path}/run")
    assert code == 0, err
    assert "loaded back: parameters bit-equal" in out


def test_resuming_on_changed_rows_is_refused(home: Path, capsys: Capture) -> None:
    again = [*USUAL, f"model.init={home}/base", f"data.train={home}/train.csv", f"data.eval={home}/eval.csv"]
    more = ["data.labels=[thing,animal]", "train.steps=4", f"train.out={home}/run"]
    rows_before = (home / "train.csv").read_text()
    try:
        (home / "train.csv").write_text(rows_before.replace("the", "a", 1))
        message = refusal(capsys, "train", *again, *more)
    finally:
        (home / "train.csv").write_text(rows_before)
    assert f"{home}/run holds a run on other rows: {home}/train.csv (or its tokenizer) has changed" in message


def test_convert_a_run(home: Path, tmp_path: Path, capsys: Capture) -> None:
    for what in ("run", "run/checkpoints/4"):
        target = tmp_path / what.replace("/", "_")
        assert run(capsys, "convert", home / what, target)[0] == 0
        weights = (home / "run/export/model.safetensors").read_bytes()
        assert (target / "model.safetensors").read_bytes() == weights
        assert json.loads((target / "config.json").read_text())["id2label"]["0"] == "thing"


def test_transformers_agrees_with_the_export(home: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [text for text, _ in rows(9, seed=5)]
    folder = str(home / "run/export")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    their_tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    inputs = their_tokenizer(texts, padding=True, return_tensors="pt")
    model, params, tokenizer = jaxft.load(folder, note=lambda _: None)
    batch = tokenizer(texts)
    assert batch["tokens"].tolist() == inputs["input_ids"].tolist()
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    ours = np.asarray(model.apply({"params": params}, **batch).logits)
    assert np.abs(ours - expected).max() < 2e-5
    assert theirs.config.id2label == {0: "thing", 1: "animal"}


# -------------------------------------------------------------------------------------------------- process behaviour


def _process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxft", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ})


def test_stdin_is_answered_while_it_is_open(home: Path) -> None:
    with _process("predict", home / "run", "-", "--top", "1") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in ("the cat", "a house"):
            process.stdin.write(f"{text}\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 100)[0], "no answer"
            assert json.loads(process.stdout.readline())["text"] == text
        process.stdin.close()
        assert process.wait(60) == 0


def test_empty_stdin(home: Path) -> None:
    with _process("predict", home / "run", "-") as process:
        out, err = process.communicate("")
    assert (process.returncode, out, err) == (0, "", "")


def test_a_reader_that_goes_away_is_no_drama(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the small cat runs\n" * 3000)
    with _process("predict", home / "run", tmp_path / "a.txt") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["label"] in LABELS
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_class_folders_and_shards_train(home: Path, tmp_path: Path, capsys: Capture) -> None:
    for i, (text, label) in enumerate(rows(24)):
        (tmp_path / "folder" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / label / f"{i}.txt").write_text(f"{text}\n")
    write_csv(tmp_path / "part-1.csv", rows(8, seed=1))
    (tmp_path / "part-2.csv").write_text(
        "label;text\n" + "".join(f"{label};{text}\n" for text, label in rows(8, seed=2))
    )
    code, out, err = run(
        capsys,
        *(
            "train",
            *USUAL,
            f"model.init={home}/base",
            f"data.train={tmp_path}/folder",
            f"data.eval={tmp_path}/part-*.csv",
        ),
        *("train.steps=2", "train.export=false", f"train.out={tmp_path}/run #1"),
    )
    assert (code, err) == (0, "")
    assert "train: 24 rows" in out
    assert "eval: 16 rows" in out
    assert f"{tmp_path}/part-2.csv: cells are separated by semicolons" in out
    assert (tmp_path / "run #1/metrics.json").exists()
