"""`jaxft.load` and what it gives: README's lines on every family, changes, labels, old folders, and writing it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_families import FAMILIES
from test_families import make_folder as make_any
from test_heads import edit, rename
from tiny import WORDS, make_folder, refusal, run

import jaxft
from jaxft import models

Capture = pytest.CaptureFixture[str]


SOME = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in ("bert", "llama", "modernbert", "roberta")))
    for name in FAMILIES
]


def refused(folder: str | Path, **asked: Any) -> str:
    with pytest.raises(jaxft.UserError) as caught:
        jaxft.load(folder, note=lambda _: None, **asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def noted(folder: str | Path, **asked: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return jaxft.load(folder, note=notes.append, **asked), notes


@pytest.mark.parametrize("family", SOME)
def test_the_lines_of_the_readme(family: str, tmp_path: Path) -> None:
    head = next(head for head in models.family(family).HEADS if head)
    model, params, tokenizer = jaxft.load(make_any(tmp_path / "source", family, head))
    assert model.head == head
    out = model.apply({"params": params}, **tokenizer(["a small cat", "the dog"]))
    assert out.hidden.shape[:2] == tokenizer(["a small cat", "the dog"])["tokens"].shape
    assert out.logits.argmax(-1).shape == out.logits.shape[:-1]


@pytest.mark.parametrize("family", SOME)
def test_save_gives_what_load_takes(family: str, tmp_path: Path) -> None:
    head = next(head for head in models.family(family).HEADS if head)
    source = make_any(tmp_path / "source", family, head)
    (source / "thresholds.json").write_text("{}")
    loaded = jaxft.load(str(source))
    trained = jax.tree.map(lambda leaf: leaf + 1, loaded.params)
    loaded.save(str(tmp_path / "same"))
    loaded.save(tmp_path / "moved", params=trained)
    for folder, expected in (("same", loaded.params), ("moved", trained)):
        again = jaxft.load(tmp_path / folder)
        # Thresholds are of the weights that they were tuned with.
        assert (tmp_path / folder / "thresholds.json").exists() == (folder == "same")
        jax.tree.map(np.testing.assert_array_equal, again.params, expected)
        assert again.tokenizer is not None
        assert again.model == loaded.model
    for wrong in ({"params": trained}, jax.tree.map(lambda leaf: leaf[:1], trained)):
        with pytest.raises(jaxft.UserError, match="params are not of this model"):
            loaded.save(tmp_path / "no", params=wrong)
    with pytest.raises(jaxft.UserError, match="already exists"):
        loaded.save(tmp_path / "same")


def test_labels(tmp_path: Path) -> None:
    unnamed = make_folder(tmp_path / "unnamed", "classification")
    named = make_folder(tmp_path / "named", "classification", ("cat", "dog"))
    bare = make_folder(tmp_path / "bare", None)
    loaded, notes = noted(unnamed, labels=["b", "a"])
    assert (loaded.labels, notes) == (("b", "a"), [])
    loaded.save(tmp_path / "saved")
    assert jaxft.load(tmp_path / "saved").labels == ("b", "a")
    loaded.save(tmp_path / "renamed", labels=["x", "y"])
    assert jaxft.load(tmp_path / "renamed").labels == ("x", "y")
    assert noted(named, labels=["cat", "dog"])[1] == []
    for folder, asked, names in ((named, "classification", ["dog", "cat"]), (named, "classification", list("abc"))):
        loaded, notes = noted(folder, head=asked, labels=names)
        assert (loaded.labels, loaded.model.config.num_labels) == (tuple(names), len(names))
        assert "initialised afresh: head/linear/kernel, head/linear/bias" in notes
    assert noted(bare, head="classification", labels=list("abc"))[0].model.config.num_labels == 3
    assert noted(bare, head="classification", num_labels=3)[0].model.config.num_labels == 3
    assert "has 2 classes (cat, dog), not those asked for (2)" in refused(named, labels=["dog", "cat"])
    assert "has 2 classes, not those asked for (3)" in refused(unnamed, labels=list("abc"))
    assert "has 2 classes, not those asked for (3)" in refused(unnamed, num_labels=3)
    assert 'for a fresh one add head="classification"' in refused(bare, labels=["a", "b"])
    assert "different names" in refused(unnamed, labels=["a", "a"])
    assert "different names" in refused(unnamed, labels="ab")
    assert "leave num_labels out" in refused(unnamed, labels=["a", "b"], num_labels=3)
    with pytest.raises(jaxft.UserError, match="3 names for a head of 2 classes"):
        jaxft.load(unnamed).save(tmp_path / "no", labels=list("abc"))
    assert "head='clasification': did you mean 'classification'?" in refused(unnamed, head="clasification")


def shares_layers(family: str) -> bool:
    """Whether layers have no parameters of their own: any number of them can run."""
    module = models.family(family)
    return any(stack.own < stack.layers for stack in module.facts(module.TINY).stacks)


@pytest.mark.parametrize("family", [one for one in SOME if not shares_layers(str(one.values[0]))])
def test_changes_that_the_weights_allow_and_contradict(family: str, tmp_path: Path) -> None:
    source = make_any(tmp_path / "source", family, None, num_hidden_layers=3)
    loaded, notes = noted(source, num_hidden_layers=2)
    assert notes == [f"the first 2 of the 3 layers in {source} are used"]
    whole = jaxft.load(source)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b[: len(a)]), loaded.params["layers"], whole.params["layers"]
    )
    loaded.save(tmp_path / "shallow")
    assert jaxft.load(tmp_path / "shallow").model.config.num_hidden_layers == 2
    assert "5 layers are asked for, the weights have 3" in refused(source, num_hidden_layers=5)
    for key, value, stored in (("num_attention_heads", 2, 4), ("vocab_size", 200, len(WORDS))):
        assert f"the weights contradict {key}={value} (there: {stored}); leave it out" in refused(
            source, **{key: value}
        )
    assert "unknown config key 'model.arch.hiden_size'" in refused(source, hiden_size=3)


def test_old_folders_that_do_not_say_what_they_are(tmp_path: Path, capsys: Capture) -> None:
    source = edit(make_folder(tmp_path / "source", "classification"), ("model_type", "architectures"))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    message = refused(source)
    assert (
        f"say which of {', '.join(models.families())} it is: jaxft convert --family, jaxft.load(..., family=), or model.family="
        in message
    )
    loaded = jaxft.load(source, family="bert")
    assert loaded.model.head == "classification"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer(["the Cat"])["tokens"].tolist() == [[2, WORDS.index("the"), WORDS.index("cat"), 3]]
    assert "no model_type" in refusal(capsys, "convert", source, tmp_path / "no")
    assert run(capsys, "convert", source, tmp_path / "new", "--family", "bert")[0] == 0
    assert jaxft.load(tmp_path / "new").model.head == "classification"
    assert run(capsys, "predict", source, "model.family=bert", "--text", "the cat")[0] == 0
    assert "did you mean 'bert'?" in refusal(capsys, "convert", source, tmp_path / "no", "--family", "brt")
    (source / "config.json").rename(source / "bert_config.json")
    assert "copy bert_config.json to it" in refused(source)


def test_folders_without_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (source / name).unlink()
    loaded, notes = noted(source)
    assert (loaded.tokenizer, notes) == (None, [f"{source} has no tokenizer files: the tokenizer is None"])
    loaded.save(tmp_path / "saved")
    code, printed, _ = run(capsys, "convert", source, tmp_path / "stored", "--to", "jaxft")
    assert (code, "no tokenizer files: none are written" in printed) == (0, True)
    assert run(capsys, "convert", tmp_path / "stored", tmp_path / "back")[0] == 0
    for folder in (source, tmp_path / "stored"):
        assert "no tokenizer" in refusal(capsys, "predict", folder, "--text", "the cat")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module.model."])
@pytest.mark.parametrize("family", SOME)
def test_names_with_a_wrapper_of_training(tmp_path: Path, family: str, wrapper: str) -> None:
    head = next(head for head in models.family(family).HEADS if head)
    source = make_any(tmp_path / "source", family, head)
    wrapped = shutil.copytree(source, tmp_path / "wrapped")
    tensors = load_file(source / "model.safetensors")
    save_file({wrapper + name: tensor for name, tensor in tensors.items()}, wrapped / "model.safetensors")
    loaded, notes = noted(wrapped)
    assert notes == [f"all tensor names begin with {wrapper!r}, which {family} has not: it is left out"]
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.tree.map(np.asarray, jaxft.load(source).params))
    bare = rename(shutil.copytree(source, tmp_path / "odd"), **{next(iter(tensors)).split(".")[0]: "odd"})
    assert "weights do not fit" in refused(bare)


def test_names_of_hub_models_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxft.hub import source

    asked: list[str] = []
    monkeypatch.setattr(source, "_from_hub", lambda name: asked.append(name) or tmp_path)
    assert source.resolve_folder("bert-base-uncased") == source.resolve_folder("org/name") == tmp_path
    assert asked == ["bert-base-uncased", "org/name"]
    for gone in ("./bert", "../a/b", "/no/such", "a/b/c", "~/no_such", Path("bert-base-uncased"), tmp_path / "no"):
        with pytest.raises(jaxft.UserError, match="does not exist"):
            source.resolve_folder(gone)
    run_file = tmp_path / "run.yaml"
    run_file.write_text("train: {steps: 3}\n")
    assert jaxft.load_config(run_file).train.steps == jaxft.load_config(str(run_file)).train.steps == 3
    assert json.loads((make_folder(tmp_path / "made") / "config.json").read_text())["model_type"] == "bert"
