"""jaxft as a library: what its names are, and training by a call."""

from __future__ import annotations

import json
import pydoc
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tiny_run

import jaxft
from jaxft.config import load_config, to_tree
from jaxft.tasks import classification


def test_public_names_are_listed_without_being_loaded() -> None:
    script = (
        "import sys, jaxft\n"
        "assert {'load', 'train', 'RunConfig', 'UserError', '__version__'} <= set(dir(jaxft)), dir(jaxft)\n"
        "assert not any(name.islower() and name in ('annotations', 'importlib') for name in dir(jaxft))\n"
        "sys.exit(bool({'jax', 'flax', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_shows_them() -> None:
    text = pydoc.plain(pydoc.render_doc(jaxft))
    for name in ("load(", "train(", "class Trained", "class RunConfig", "export_folder("):
        assert name in text


def test_types_ship() -> None:
    assert (Path(jaxft.__file__).parent / "py.typed").is_file()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> jaxft.Trained:
    folder = tmp_path_factory.mktemp("python")
    tree = to_tree(load_config(None, tiny_run.overrides(folder, "train.steps=6", f"train.out={folder / 'run'}")))
    return jaxft.train(tree, classification, quiet=True)


def test_the_result_is_what_lies_in_the_folder(run: jaxft.Trained) -> None:
    assert not run.interrupted
    assert run.metrics == json.loads((run.folder / "metrics.json").read_text())
    assert run.labels == tiny_run.CLASSES
    exported = jaxft.load(str(run.folder / "export"), note=lambda text: None)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), run.params, exported.params))
    batch = run.tokenizer(["animal1 word2"], length=12)
    logits = run.model.apply({"params": run.params}, **batch).logits
    assert np.asarray(logits).shape == (1, 3)


def test_the_same_call_goes_on_from_the_folder(run: jaxft.Trained, capsys: pytest.CaptureFixture[str]) -> None:
    again = jaxft.train(run.config)
    assert again.metrics == run.metrics
    said = capsys.readouterr().out
    assert said.count("exported ") == 1


def test_a_run_file_and_overrides(run: jaxft.Trained, tmp_path: Path) -> None:
    with pytest.raises(jaxft.UserError, match=r"unknown config key 'train\.step'"):
        jaxft.train(run.folder / "config.yaml", overrides=["train.step=3"])
    with pytest.raises(jaxft.UserError, match="does not exist"):
        jaxft.train(tmp_path / "no.yaml")
    with pytest.raises(jaxft.UserError, match="expected a run file, nested dicts or a RunConfig, found int"):
        jaxft.train(3)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(jaxft.UserError, match="give a module"):
        jaxft.train(run.config, task=classification.Task)  # pyrefly: ignore[bad-argument-type]


def test_several_seeds(run: jaxft.Trained, tmp_path: Path) -> None:
    more = ["train.seeds=[0,1]", f"train.out={tmp_path}", "train.steps=2", f"data.test={run.config.data.train}"]
    both = jaxft.train(run.config, overrides=more, quiet=True)
    assert set(both.seeds) == {0, 1}
    assert both.metrics["loss"] == pytest.approx(np.mean([one.metrics["loss"] for one in both.seeds.values()]))
    assert both.seeds[1].folder == tmp_path / "seed1"
    assert both.test["loss"] == pytest.approx(np.mean([one.test["loss"] for one in both.seeds.values()]))
    assert both.test["loss"] != both.metrics["loss"]
    assert (run.test, len(both.seeds[0].test["classes"])) == ({}, 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    from jaxft.data.processors.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return Tokenizer(folder, 16)


def test_rows_are_padded_as_asked(tokenizer) -> None:
    texts = ["the cat", "the small dog sings"]
    plain = tokenizer(texts)
    assert plain["tokens"].shape == (2, 6)
    for wide in (tokenizer(texts, length=12), tokenizer(texts, buckets=[16, 12, 4])):
        assert wide["tokens"].shape == (2, 12)
        assert (wide["tokens"][:, :6] == plain["tokens"]).all()
        assert wide["mask"].sum() == plain["mask"].sum()
        assert (wide["tokens"][:, 6:] == tokenizer.pad_id).all()
    for wrong in ({"length": 5}, {"buckets": [4, 5]}, {"buckets": []}, {"length": 8, "buckets": [8]}):
        with pytest.raises(jaxft.UserError, match=r"max_length|give one of the two"):
            tokenizer(texts, **wrong)


def test_ids_back_to_text(tokenizer) -> None:
    batch = tokenizer(["The small cat", "the dog"], length=8)
    assert tokenizer.decode(batch["tokens"]) == ["the small cat", "the dog"]
    assert tokenizer.decode(batch["tokens"][1]) == "the dog"
    assert tokenizer.decode(batch["tokens"][1].tolist(), special=True).split()[:4] == ["[CLS]", "the", "dog", "[SEP]"]


def test_spans_lie_beside_the_tokens(tokenizer) -> None:
    texts, pairs = ["the small cat", "dog"], ["not a bird", "the red house"]
    batch, spans = tokenizer(texts, pairs, length=12), tokenizer.spans(texts, pairs, length=12)
    for name in ("words", "sources"):
        assert spans[name].shape == batch["tokens"].shape
        assert spans[name].dtype == np.int32
    for i in range(2):
        for j in range(12):
            source = spans["sources"][i, j]
            token = tokenizer.decode([batch["tokens"][i, j]])
            if source == -1:
                assert token == ""
                assert (spans["offsets"][i, j] == -1).all()
                assert spans["words"][i, j] == -1
                continue
            text = (texts, pairs)[source][i]
            first, last = spans["offsets"][i, j]
            assert text[first:last] == token == text.split()[spans["words"][i, j]]
            assert source == batch["types"][i, j]
