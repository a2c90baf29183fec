"""Label order, labels and texts that cannot be used, truncation, held-out rows, text pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers, processors

from jaxft.config import DataConfig, RunConfig
from jaxft.data.encode import read_rows
from jaxft.data.examples import Split, make_split
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.tasks import Targets, classification

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
CLS, SEP, A, B, C = 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    fast: Any = Fast(models.WordPiece(ids, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    made = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(made / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "token_type_ids"]}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def labelled(*labels: Any) -> list[Row]:
    return [Row(("a", label), f"f.csv:{i + 2}") for i, label in enumerate(labels)]


def encoded(rows: list[Row], labels: tuple[str, ...], tokenizer: Tokenizer) -> Split:
    config = RunConfig()
    found = classification.encode(rows, tokenizer, Targets(labels), config)
    return make_split("train", found, classification.fields(config, tokenizer.pad_id))


def test_class_ids_follow_the_order_given(folder: Path) -> None:
    split = encoded(labelled("x", "y", "z", "x"), ("z", "x", "y"), Tokenizer(folder, 8))
    assert split.columns["labels"].tolist() == [1, 2, 0, 1]
    assert split.columns["labels"].dtype == np.int32


def test_unknown_label_says_where(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^f\.csv:3: unknown label 'anmal': did you mean 'animal'\?$"):
        encoded(labelled("animal", "anmal"), ("animal", "food"), Tokenizer(folder, 8))


@pytest.mark.parametrize("empty", ["", "   "])
def test_empty_label_says_where(tmp_path: Path, empty: str) -> None:
    path = tmp_path / "f.csv"
    path.write_text(f"text,label\na,x\nb,{empty}\n")
    with pytest.raises(UserError, match=r"f\.csv:3: column 'label' is empty; every row needs a label"):
        read_rows(str(path), DataConfig())


def test_missing_texts_are_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("".join(f'{{"text": {text}, "label": 1}}\n' for text in ('"a"', "null", '""', '" "', '"b"')))
    cure = "remove the row, or leave such rows out with data.missing_text=skip"
    with pytest.raises(UserError, match=rf"f\.jsonl:2: column 'text' holds no text \(null\); {cure}"):
        read_rows(str(path), DataConfig())
    notes: list[str] = []
    rows = read_rows(str(path), DataConfig(missing_text="skip"), note=notes.append)
    assert [row.values[0] for row in rows] == ["a", "b"]
    assert notes == [f"{path}: 3 of 5 rows have no text and are left out"]
    path.write_text('{"text": null, "label": 1}\n')
    with pytest.raises(UserError, match="no row has a text"):
        read_rows(str(path), DataConfig(missing_text="skip"))


@pytest.mark.parametrize("value", ["3", "true"])
def test_text_must_be_text(tmp_path: Path, value: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(f'{{"text": "a", "label": 1}}\n{{"text": {value}, "label": 1}}\n')
    with pytest.raises(UserError, match=r"f\.jsonl:2: column 'text' holds .*, which is not text"):
        read_rows(str(path), DataConfig())


def test_empty_data_set(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"f\.csv: the data set is empty"):
        read_rows(str(tmp_path / "f.csv"), DataConfig())


def test_truncation_is_counted(folder: Path) -> None:
    texts = ["a", "a b c", "a b c d", "a b c d a", ""]
    rows = [Row((text, "x"), "") for text in texts]
    split = encoded(rows, ("x", "y"), Tokenizer(folder, 5))
    assert split.truncated == 2
    assert split.sizes("length").tolist() == [3, 5, 5, 5, 2]
    assert split[2]["tokens"].tolist() == [CLS, A, B, C, SEP]
    assert split[4]["tokens"].tolist() == [CLS, SEP]


def test_text_pairs(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("one,two,y\na b,c,0\na,b c a b c,1\na,,0\n")
    rows = read_rows(str(path), DataConfig(text="one", text_pair="two", label="y"))
    split = encoded(rows, ("0", "1"), Tokenizer(folder, 7))
    assert split[0]["tokens"].tolist() == [CLS, A, B, SEP, C, SEP]
    assert split[0]["types"].tolist() == [0, 0, 0, 0, 1, 1]
    assert split[1]["tokens"].tolist() == [CLS, A, SEP, B, C, A, SEP]
    assert split[2]["tokens"].tolist() == [CLS, A, SEP, SEP]
    assert split.truncated == 1


def test_tokenising_in_chunks_changes_nothing(folder: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(2500)]
    rows = [Row((text, "x"), "") for text in texts]
    split = encoded(rows, ("x",), Tokenizer(folder, 64))
    for i in (0, 1023, 1024, 2047, 2048, 2499):
        assert split[i]["tokens"].tolist() == [CLS, *(VOCABULARY.index(w) for w in texts[i].split()), SEP]
