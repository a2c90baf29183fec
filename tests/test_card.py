"""Model cards: metadata that the hub's own library reads, texts that break nothing, and no folder of this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from jaxft.cli.run_card import _base_name, _sources
from jaxft.reporting.card import Card, SplitFacts, card_metadata, card_text, plain, report_markdown

SCORES = {
    "accuracy": 0.75,
    "macro_f1": 0.5,
    "loss": float("nan"),
    "intervals": {"accuracy": [0.7, 0.8]},
    "classes": {
        "a|b": {"precision": 1.0, "recall": 0.5, "f1": 0.25, "rows": 3},
        "good": {"precision": 1.0, "recall": 1.0, "f1": 0.9, "rows": 1200},
    },
}
CARD = Card(
    name="run: #1",
    architecture="BertForSequenceClassification",
    parameters=22_716_296,
    base="org/base",
    task="classification",
    labels=("a|b", "good\n# no heading"),
    counts=(3, 1200),
    splits=(SplitFacts("train", ("rows.csv",), 1203, "0123456789abcdef99"), SplitFacts("eval", (), 120, "f" * 64)),
    scores={"eval": SCORES},
    training={"seed": "0"},
    settings="optim.learning_rate: 0.0001\n",
    inherited={"license": "mit", "language": ["en", "de"]},
)


def head_of(text: str) -> Any:
    """The metadata of a card, as the hub's own library reads it."""
    return ModelCard(text).data


def test_the_hubs_library_reads_the_head_of_a_card() -> None:
    data = head_of(card_text(CARD))
    assert (data.license, data.language) == ("mit", ["en", "de"])
    assert (data.base_model, data.pipeline_tag) == ("org/base", "text-classification")
    assert data.model_name == "run: #1"
    assert data.tags == ["jaxft", "classification"]
    found = {result.metric_type: result.metric_value for result in data.eval_results or []}
    assert found == {"accuracy": 0.75, "macro_f1": 0.5}  # NaN is no score
    assert {result.dataset_name for result in data.eval_results or []} == {"rows.csv"}  # of which it is a part


def test_a_card_says_what_there_is_and_what_is_weak() -> None:
    text = card_text(CARD)
    assert "| accuracy | 0.7500 | 0.7000 to 0.8000 |" in text
    assert "| held-out | a part of the training files | 120 | `ffffffffffffffff` |" in text
    assert "| training | rows.csv | 1,203 | `0123456789abcdef` |" in text
    assert "Weakest class: a\\|b, F1 0.2500 on 3 rows." in text
    assert "Labels are uneven" in text
    assert "the held-out rows that the scores are of" in text
    tested = (*CARD.splits, SplitFacts("test", ("test.csv",), 12, "a" * 64))
    both = dataclasses.replace(CARD, splits=tested, scores={"eval": SCORES, "test": SCORES})
    assert "the held-out rows that the scores are of" not in card_text(both)
    assert 'pipeline("text-classification", "FOLDER")' in text


def test_labels_break_neither_tables_nor_pages() -> None:
    text = card_text(CARD)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert any("a\\|b" in row for row in rows)
    assert not any(line.startswith("# no heading") for line in text.splitlines())
    assert plain("<b>*x*\n[y](z)`") == "\\<b\\>\\*x\\* \\[y\\](z)\\`"


def test_folders_of_sentence_transformers_say_how_they_are_loaded() -> None:
    card = dataclasses.replace(CARD, architecture="BertModel", task="embedding", sentences=True, labels=(), counts=())
    text = card_text(card)
    assert head_of(text).pipeline_tag == "sentence-similarity"
    assert 'SentenceTransformer("FOLDER")' in text


def test_a_task_of_another_package_on_a_class_without_a_pipeline() -> None:
    card = dataclasses.replace(CARD, architecture="BertForMultipleChoice", task="my_package.my_task", base=None)
    text = card_text(card)
    assert head_of(text).tags == ["jaxft", "my-task"]
    assert "BertForMultipleChoice.from_pretrained" in text
    assert "trained from random weights for my task" in text


def test_the_report_has_the_pictures_beside_it() -> None:
    text = report_markdown(CARD, [Path("/run/metrics.json"), Path("/run/curves.png")])
    assert "![curves](curves.png)" in text
    assert "metrics.json" not in text
    assert "/run" not in text


@pytest.mark.parametrize(
    ("init", "said"),
    [("org/name", "org/name"), ("/home/me/models/mine", "mine"), ("./a/b", "b"), ("pkg:package/model", "package")],
)
def test_where_a_model_lies_on_this_machine_is_not_told(init: str, said: str) -> None:
    assert _base_name(init) == said


def test_of_files_the_names_alone_are_told() -> None:
    assert _sources(("/home/me/a.csv", "b/c.jsonl")) == ("a.csv", "c.jsonl")
    assert _sources("tfds:glue/sst2:train") == ("tfds:glue/sst2:train",)
    assert _sources(None) == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\nlanguage: en\ntags: [x]\n---\n# card", {"license": "mit", "language": "en"}),
        ("# no head\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: {a: b}\n---\n", {}),
        ("---\n: [\n---\n", {}),
        ("---\na: &a [x]\nlicense: *a\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: mit", {}),
        ("", {}),
    ],
)
def test_the_head_of_a_card_is_read_if_it_can_be(text: str, found: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    assert card_metadata(path) == found


def test_a_card_that_is_no_text_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert card_metadata(tmp_path / "README.md") == {}
    assert card_metadata(tmp_path) == {}
    assert card_metadata(tmp_path / "none") == {}
