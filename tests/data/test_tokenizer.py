"""Tokenizer folders: what decides the ids, and that an export keeps them. Folders of all kinds: tests/zoo/tokenizers.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tiny import LABELS, WORDS, make_folder, refusal, rows, run, write_csv, write_tokenizer

import jaxft
from jaxft.data.processors import tokenizer_classes
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError

Capture = pytest.CaptureFixture[str]


def change(path: Path, **keys: Any) -> None:
    tree = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(tree | keys))


def ids(folder: Path, *texts: str, max_length: int | None = None, **how: Any) -> list[list[int]]:
    return [row for row, _, _ in Tokenizer(folder, max_length).encode(texts, **how)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_classes_are_those_of_the_reference() -> None:
    """The table of classes by model_type agrees with that of the installed `transformers`."""
    auto = pytest.importorskip("transformers.models.auto.tokenization_auto")
    for name, kinds in tokenizer_classes._CLASS_OF_MODEL_TYPES.items():
        for kind in kinds.split():
            assert kind not in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
            theirs = auto.TOKENIZER_MAPPING_NAMES.get(kind)
            assert (theirs or tokenizer_classes.GENERIC[0]) == name, kind
    for alias, name in tokenizer_classes._ALIASES.items():
        theirs = auto.tokenizer_class_from_name(alias)
        assert name in [kind.__name__ for kind in theirs.__mro__], alias
        assert theirs.model_input_names == auto.tokenizer_class_from_name(name).model_input_names


def test_the_usual_folder_is_read_without_transformers(folder: Path) -> None:
    script = (
        "import sys; sys.modules['transformers'] = None; from pathlib import Path; "
        "from jaxft.data.processors.tokenizer import Tokenizer; "
        f"print(Tokenizer(Path({str(folder)!r}), 8).encode(['The CAT'])[0][0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([2, WORDS.index("the"), WORDS.index("cat"), 3]), done.stderr


def test_what_is_cut_off_follows_the_settings(folder: Path) -> None:
    text, (red, green, blue) = "red green blue", (WORDS.index(word) for word in ("red", "green", "blue"))
    assert ids(folder, text, max_length=4) == [[2, red, green, 3]]
    assert ids(folder, text, max_length=3, split=True) == [[2, red, 3], [2, green, 3], [2, blue, 3]]
    change(folder / "tokenizer_config.json", truncation_side="left")
    assert ids(folder, text, max_length=4) == [[2, green, blue, 3]]
    # Nothing is cut off a text that is split.
    assert ids(folder, text, max_length=3, split=True) == [[2, red, 3], [2, green, 3], [2, blue, 3]]
    assert ids(folder, text, max_length=4) == [[2, green, blue, 3]]


def test_texts_that_no_token_stands_for_are_refused(folder: Path) -> None:
    change(folder / "tokenizer_config.json", unk_token="[NONE]")
    assert ids(folder, "red") == [[2, WORDS.index("red"), 3]]
    with pytest.raises(UserError, match="cannot encode a text"):
        ids(folder, "unheard")


def test_an_export_keeps_the_ids_of_its_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    """Settings that contradict tokenizer.json: the export gives the same to us and to `transformers`."""
    transformers = pytest.importorskip("transformers")
    source = make_folder(tmp_path / "source", vocab_size=len(WORDS) + 1)
    change(source / "tokenizer_config.json", do_lower_case=False, additional_special_tokens=["<ent>"])
    (source / "README.md").write_text("# a model")
    code, out, err = run(capsys, "convert", source, tmp_path / "target")
    assert code == 0, err
    assert "carried over" in out
    assert "README.md" in out
    for text in ("the Cat", "<ent> the cat", "Red"):
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "target"))(text)["input_ids"]
        assert ids(source, text) == ids(tmp_path / "target", text) == [theirs]
    assert len(WORDS) in ids(source, "<ent> the cat")[0]


def test_an_export_names_a_class_where_the_model_would_ask_for_another(folder: Path, tmp_path: Path) -> None:
    """A generic tokenizer that keeps case, trained with a model whose own class would lower it."""
    transformers = pytest.importorskip("transformers")
    tree = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tree | {"normalizer": None}))
    (folder / "tokenizer_config.json").unlink()
    export = tmp_path / "export"
    export.mkdir()
    change(export / "config.json", model_type="bert")
    Tokenizer(folder, 16).save(export, 16)
    theirs = transformers.AutoTokenizer.from_pretrained(str(export))
    for text in ("The cat", "the cat"):
        assert ids(folder, text) == ids(export, text) == [theirs(text)["input_ids"]]
    assert theirs.model_max_length == Tokenizer(export).stated_length == 16


def test_types_beyond_the_table_are_refused(tmp_path: Path, capsys: Capture) -> None:
    model = make_folder(tmp_path / "model", "classification", LABELS, type_vocab_size=1)
    data = write_csv(tmp_path / "rows.csv", [("the cat", text, label) for text, label in rows(12)], ("a", "b", "label"))
    columns = (
        "data.text=a",
        "data.text_pair=b",
        "data.label=label",
        "data.max_length=16",
        f"train.out={tmp_path / 'run'}",
    )
    pairs = "rows of two texts have token types up to 1, the model's table of types has type_vocab_size=1 rows"
    assert pairs in refusal(capsys, "train", f"model.init={model}", f"data.train={data}", *columns)
    assert pairs in refusal(capsys, "predict", model, "--text", "the cat", "--pair", "a dog")
    loaded, params, tokenizer = jaxft.load(str(model), note=lambda text: None)
    with pytest.raises(UserError, match="token type 1 is not in the table of 1 rows"):
        loaded.apply({"params": params}, **tokenizer("the cat", "a dog"))
    with pytest.raises(UserError, match="position 40 is not in the table of 32 rows"):
        loaded.apply({"params": params}, **tokenizer("cat"), positions=jnp.asarray([[0, 1, 40]]))


def test_ids_put_around_texts_that_the_table_has_not_are_refused(tmp_path: Path, capsys: Capture) -> None:
    model = make_folder(tmp_path / "model", "classification", LABELS)
    # The class that takes tokenizer.json as it is.
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    generic = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    stated = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(stated | generic))
    path = model / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["post_processor"]["sep"] = ["[SEP]", 40_000]
    path.write_text(json.dumps(tree))
    said = refusal(capsys, "predict", model, "--text", "the cat")
    assert "the tokenizer has 40001 tokens, the model's embedding table" in said
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 7}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}},
    }
    path.write_text(json.dumps(tree))
    assert "rows of one text have token types up to 7" in refusal(capsys, "predict", model, "--text", "the cat")


def test_the_digest_is_of_what_a_tokenizer_means(folder: Path, tmp_path: Path) -> None:
    made = Tokenizer(folder)
    digest = made.digest()
    (tmp_path / "saved").mkdir()
    made.save(tmp_path / "saved", max_length=8)
    assert Tokenizer(tmp_path / "saved", max_length=5).digest() == digest
    cut = Tokenizer(folder, max_length=3)
    assert cut.digest() == digest
    assert len(cut.encode(["cat dog cat dog"])[0][0]) == 3  # and cuts as before
    settings = {"do_lower_case": False, "truncation_side": "left", "mask_token": "cat", "extra_special_tokens": ["cat"]}
    digests = {digest}
    for name, value in settings.items():
        change(Path(shutil.copytree(folder, tmp_path / name)) / "tokenizer_config.json", **{name: value})
        digests.add(Tokenizer(tmp_path / name).digest())
    write_tokenizer(tmp_path / "more", ("zebra",))
    digests.add(Tokenizer(tmp_path / "more").digest())
    assert len(digests) == 6
