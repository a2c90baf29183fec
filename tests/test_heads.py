"""Heads that are something else than one label of several: kept as they are, answered by the tasks that they are for, and never taken for
a classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_families import train
from tiny import make_folder, refusal, rows, run, write_csv

import jaxft
from jaxft import models
from jaxft.hub.source import open_source

Capture = pytest.CaptureFixture[str]
PROBLEMS = [
    ("regression", 1),
    ("multi_label_classification", 3),
    (None, 1),
    ("single_label_classification", 1),
    ("ordinal", 3),
]
ANSWERED = (("regression", 1), ("multi_label_classification", 3), (None, 1))
"""Those that a task is for."""


def edit(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """Changes config.json."""
    path = folder / "config.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in drop}))
    return folder


def rename(folder: Path, **changes: str | None) -> Path:
    """Renames tensors by the beginnings of their names; None drops them."""
    made = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        start = next((start for start in changes if name.startswith(start.replace("__", "."))), None)
        if start is None:
            made[name] = tensor
        elif (to := changes[start]) is not None:
            made[to + name.removeprefix(start.replace("__", "."))] = tensor
    save_file(made, folder / "model.safetensors")
    return folder


def of_problem(folder: Path, problem: str | None, classes: int) -> Path:
    """A folder whose classification head is for something else."""
    make_folder(folder, "classification", num_labels=classes, labels=None)
    names: dict[str, Any] = {"id2label": {str(i): f"score {i}" for i in range(classes)}} if classes > 1 else {}
    return edit(folder, problem_type=problem, **names)


def is_kept(folder: Path, source: Path) -> None:
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    assert {key: after.get(key) for key in ("problem_type", "id2label", "architectures")} == {
        key: before.get(key) for key in ("problem_type", "id2label", "architectures")
    }
    ours, theirs = (load_file(path / "model.safetensors") for path in (source, folder))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("problem", "classes"), PROBLEMS)
def test_other_problems_are_kept_and_answered_by_their_own_tasks_alone(
    tmp_path: Path, capsys: Capture, problem: str | None, classes: int
) -> None:
    source = of_problem(tmp_path / "source", problem, classes)
    data = write_csv(tmp_path / "rows.csv", rows(8))
    assert run(capsys, "convert", source, tmp_path / "target")[0] == 0
    is_kept(tmp_path / "target", source)
    assert run(capsys, "convert", source, tmp_path / "stored", "--to", "jaxft")[0] == 0
    assert run(capsys, "convert", tmp_path / "stored", tmp_path / "back")[0] == 0
    is_kept(tmp_path / "back", source)
    loaded = jaxft.load(source)
    loaded.save(tmp_path / "saved")
    is_kept(tmp_path / "saved", source)
    for model in (source, tmp_path / "stored"):
        if (problem, classes) in ANSWERED:
            code, out, err = run(capsys, "predict", model, "--text", "the cat")
            assert code == 0, err
            assert set(json.loads(out)) == {"text", *({"score"} if classes == 1 else {"labels", "probabilities"})}
            continue
        for message in (
            refusal(capsys, "predict", model, "--text", "the cat"),
            refusal(capsys, "eval", model, f"data.eval={data}"),
        ):
            assert f"is for {problem or 'regression'} (" in message
            assert "model.head=fresh" in message
    message = refusal(
        capsys,
        "train",
        f"model.init={source}",
        f"data.train={data}",
        f"data.eval={data}",
        f"train.out={tmp_path / 'no'}",
    )
    assert "it cannot be trained further; set model.head=fresh" in message
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("problem", "classes"), PROBLEMS[:2])
def test_exports_of_other_problems_load_in_the_reference(
    tmp_path: Path, capsys: Capture, problem: str, classes: int
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    source = of_problem(tmp_path / "source", problem, classes)
    loaded = jaxft.load(source)
    loaded.save(tmp_path / "saved")
    assert loaded.tokenizer is not None
    batch = loaded.tokenizer(["the cat sleeps", "a dog"])
    ours = loaded.model.apply({"params": loaded.params}, **batch).logits
    theirs = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "saved")).eval()
    assert theirs.config.problem_type == problem
    assert theirs.config.num_labels == classes
    names = {"input_ids": "tokens", "attention_mask": "mask", "token_type_ids": "types"}
    with torch.no_grad():
        expected = theirs(**{to: torch.tensor(batch[name].astype(np.int64)) for to, name in names.items()}).logits
    np.testing.assert_allclose(ours, expected.numpy(), atol=2e-5)


def test_a_fresh_head_in_place_of_another(tmp_path: Path, capsys: Capture) -> None:
    """It is one label of several, whatever the folder's head was for, in the export and in what is made of checkpoints."""
    source = of_problem(tmp_path / "source", "regression", 1)
    printed = train(capsys, tmp_path, source, "run", "bert", "model.head=fresh")
    assert "in the checkpoint, not used: classifier.weight, classifier.bias" in printed
    checkpoint = max((tmp_path / "run/checkpoints").iterdir())
    assert run(capsys, "convert", checkpoint, tmp_path / "made")[0] == 0
    for folder in (tmp_path / "run/export", tmp_path / "made"):
        config = json.loads((folder / "config.json").read_text())
        assert config["problem_type"] == "single_label_classification"
        assert sorted(config["id2label"].values()) == ["animal", "thing"]
    assert run(capsys, "predict", checkpoint, "--text", "the cat")[0] == 0


FOREIGN = ["BertLMHeadModel", "MyBert"]


@pytest.mark.parametrize("architecture", FOREIGN)
def test_architectures_that_the_family_does_not_have(tmp_path: Path, capsys: Capture, architecture: str) -> None:
    source = edit(make_folder(tmp_path / "source", "classification"), architectures=[architecture])
    data = write_csv(tmp_path / "rows.csv", rows(8))
    for command in (
        ("predict", source, "--text", "the cat"),
        ("eval", source, f"data.eval={data}"),
        ("convert", source, tmp_path / "no"),
        ("train", f"model.init={source}", f"data.train={data}", f"data.eval={data}", f"train.out={tmp_path / 'no'}"),
        ("plan", "--topology", "cpu:1", f"model.init={source}"),
    ):
        message = refusal(capsys, *command)
        assert f"{architecture} is not supported: bert here has the heads classification (BertForSequenceC" in message
        assert "--head none), or train one of these heads on it with model.head=fresh" in message
        assert "model.head=fresh" in message
    with pytest.raises(jaxft.UserError, match=architecture):
        jaxft.load(source)
    notes: list[str] = []
    jaxft.load(source, head=None, note=notes.append)
    assert notes == ["in the checkpoint, not used: classifier.weight, classifier.bias"]
    assert run(capsys, "convert", source, tmp_path / "bare", "--head", "none")[0] == 0
    assert not any("classifier" in name for name in load_file(tmp_path / "bare/model.safetensors"))


@pytest.mark.slow
def test_a_run_from_the_encoder_below_a_foreign_head(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification")
    rename(source, classifier="crf.start", bert__pooler=None)
    edit(source, architectures=["BertCRF"])
    printed = train(capsys, tmp_path, source, "run", "bert", "model.head=fresh")
    assert "initialised afresh: pooler/kernel, pooler/bias, head/linear/kernel, head/linear/bias" in printed
    assert "in the checkpoint, not used: crf.start.bias, crf.start.weight" in printed
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "run/export/model.safetensors")
    shared = [name for name in after if name in before]
    assert len(shared) == len(before) - 2
    assert max(float(np.abs(after[name] - before[name]).max()) for name in shared) < 0.01


def test_tensors_tell_where_no_architecture_is_named(tmp_path: Path, capsys: Capture) -> None:
    source = edit(make_folder(tmp_path / "source", "classification"), ("architectures",))
    assert jaxft.load(source, note=lambda _: None).model.head == "classification"
    rename(source, bert__pooler=None)  # classifiers of single tokens have none
    assert jaxft.load(source, note=lambda _: None).model.head == "token_classification"
    rename(source, classifier="qa_outputs")
    assert jaxft.load(source, note=lambda _: None).model.head == "question_answering"
    assert "question_answering" in refusal(capsys, "predict", source, "--text", "the cat")
    rename(source, qa_outputs="score")
    found = "a head for sequence_classification (by its tensors)"
    assert f"{found} is not supported" in refusal(capsys, "predict", source, "--text", "the cat")
    assert jaxft.load(source, head=None, note=lambda _: None).model.head is None


def test_nothing_that_is_served_is_random(tmp_path: Path, capsys: Capture) -> None:
    data = write_csv(tmp_path / "rows.csv", rows(8))
    bare = make_folder(tmp_path / "bare", None)
    for architecture, changes, lacks in (
        ("BertForSequenceClassification", {"bert__pooler": None}, "bert.pooler.dense.weight"),
        ("BertForSequenceClassification", {"classifier": None}, "classifier.weight"),
        ("BertForMaskedLM", {"classifier": None, "bert__pooler": None}, "cls.predictions.bias"),
    ):
        source = rename(make_folder(tmp_path / f"{architecture}{len(changes)}{lacks}", "classification"), **changes)
        edit(source, architectures=[architecture])
        assert lacks in refusal(capsys, "convert", source, tmp_path / "no")
        with pytest.raises(jaxft.UserError, match="nothing is used that would be random"):
            jaxft.load(source)
    message = refusal(capsys, "predict", tmp_path / "BertForSequenceClassification1classifier.weight", "--text", "a")
    assert "its weights lack classifier.weight, classifier.bias" in message
    source = tmp_path / "BertForSequenceClassification1bert.pooler.dense.weight"
    message = refusal(
        capsys, "train", f"model.init={source}", f"data.train={data}", f"data.eval={data}", f"train.out={tmp_path / 'no'}",
        "data.labels=[animal,thing]", "data.max_length=12", "train.batch_size=8", "eval.batch_size=8", "log.progress=off",
    )  # fmt: skip
    assert "train with model.head=fresh" in message
    assert jaxft.load(bare).model.head is None


def test_a_bare_architecture_over_weights_with_a_head(tmp_path: Path) -> None:
    source = edit(make_folder(tmp_path / "source", "classification"), architectures=["BertModel"])
    notes: list[str] = []
    assert jaxft.load(source, note=notes.append).model.head is None
    assert notes[0].startswith("config.json says BertModel, which has no head, the weights have classifier.")


def test_architectures_of_other_libraries_and_of_both_heads(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", "masked_lm")
    for named in ("FlaxBertForMaskedLM", "TFBertForMaskedLM", "BertForPreTraining"):
        assert open_source(edit(source, architectures=[named]), print).head == "masked_lm"
    assert open_source(edit(source, ("model_type",), architectures=["BertForTripletScores"]), print).foreign
    assert jaxft.load(edit(source, ("architectures",), model_type="bert")).model.head == "masked_lm"


@pytest.mark.parametrize("name", ["deberta", "canine", "luke", "xlm", "llama4", "gpt_neo", "blenderbot"])
def test_other_families_are_no_slips(name: str) -> None:
    with pytest.raises(jaxft.UserError) as caught:
        models.family(name)
    known = ", ".join(models.families())
    assert str(caught.value) == f"model family {name!r} is not supported; there are: {known}"
    assert len(str(caught.value)) <= 300
    for slip, meant in (("brt", "bert"), ("BERT", "bert"), ("lama", "llama")):
        with pytest.raises(jaxft.UserError, match=f"did you mean '{meant}'"):
            models.family(slip)
