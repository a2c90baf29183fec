"""Labels that are renamed, rows that are left out, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxft.config import DataConfig, RunConfig, load_config
from jaxft.data.encode import Column, read_rows
from jaxft.errors import UserError
from jaxft.tasks import task
from jaxft.training.setup import settled

ROWS = [
    ("a", "pos"),
    ("b", "Positive"),
    ("c", "unsure"),
    ("d", None),
    ("e", " "),
    ("f", "neg"),
    (" ", "neg"),
    ("g", "pos"),
]


def written(folder: Path, rows: list[tuple[Any, Any]] = ROWS) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def read(path: str, **settings: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
    notes: list[str] = []
    rows = read_rows(path, DataConfig(**settings), note=notes.append)
    return [row.values for row in rows], [note.removeprefix(f"{path}: ") for note in notes]


def test_labels_are_renamed_merged_and_left_out(tmp_path: Path) -> None:
    declared = {"pos": "positive", "Positive": "positive", "unsure": None, "maybe": None, "neg": "pos"}
    rows, notes = read(written(tmp_path), missing_text="skip", missing_label="skip", label_map=declared)
    assert rows == [("a", "positive"), ("b", "positive"), ("f", "pos"), ("g", "positive")]  # once, not in a chain
    assert notes == [
        "1 of 8 rows have no text and are left out",
        "2 of 8 rows have no label and are left out",
        "1 of 8 rows are left out by data.label_map: 'unsure' (1)",
        "data.label_map: 'pos' is 'positive' (2 rows), 'Positive' is 'positive' (1 rows), 'neg' is 'pos' (1 rows)",
        "data.label_map: no row has label 'maybe'",
    ]


def test_labels_are_those_of_the_rule(tmp_path: Path) -> None:
    path = written(tmp_path, [("a", 1), ("b", "1.0"), ("c", True), ("d", 2.5)])
    assert read(path, label_map={"1": "one", "True": "yes"})[0] == [
        ("a", "one"),
        ("b", "one"),
        ("c", "yes"),
        ("d", 2.5),
    ]


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (ROWS, {}, "a.jsonl:4: column 'label' is empty; every row needs a label (data.missing_label=skip leaves such"),
        (ROWS[3:5], {"missing_label": "skip"}, "no row is left: 2 of 2 rows have no label and are left out"),
        (
            ROWS[:2],
            {"label_map": {"pos": None, "Positive": None}},
            "left out by data.label_map: 'pos' (1), 'Positive' (1)",
        ),
        (ROWS, {"label_map": {"1": "a", "1.0": "b"}}, "data.label_map: label '1' is there twice"),
        (ROWS, {"label_map": {"pos": " "}}, "data.label_map: the name of 'pos' is empty"),
        (ROWS, {"label_map": {" ": "pos"}}, "data.label_map: a label is empty"),
        ([(" ", "x"), ("", "y")], {}, "all of its 2 texts are empty (column 'text', data.text)"),
    ],
)
def test_refusals(tmp_path: Path, rows: list[tuple[Any, Any]], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(written(tmp_path, rows), **settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_may_be_missing_too(tmp_path: Path) -> None:
    path = written(tmp_path, [("a", 1.5), ("b", None), ("c", "")])
    columns = (Column("text", "text"), Column("label", "number"))
    rows = read_rows(path, DataConfig(missing_label="skip"), columns)
    assert [row.values for row in rows] == [("a", 1.5)]
    with pytest.raises(UserError, match="every row needs a number"):
        read_rows(path, DataConfig(), columns)


def test_groups_are_read_beside_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "x", "who": 1}\n{"text": "b", "label": "y", "who": "1.0"}\n')
    rows = read_rows(str(path), DataConfig(split_group="who"), grouped=True)
    assert [(row.values, row.group) for row in rows] == [(("a", "x"), "1"), (("b", "y"), "1")]
    assert read_rows(str(path), DataConfig(split_group="who"))[0].group == ""
    # A column that is read anyway, as the query of passages.
    assert [row.group for row in read_rows(str(path), DataConfig(split_group="text"), grouped=True)] == ["a", "b"]
    with pytest.raises(
        UserError, match=r"no column 'whom': did you mean 'who'\? .*; set data.split_group to one of these"
    ):
        read_rows(str(path), DataConfig(split_group="whom"), grouped=True)
    path.write_text('{"text": "a", "label": "x", "who": null}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: column 'who' is empty; data.split_group needs a group for every"):
        read_rows(str(path), DataConfig(split_group="who"), grouped=True)


def test_settings_are_read_as_they_are_typed() -> None:
    config = load_config(None, ["data.label_map={pos: positive, no: null, 0: zero, yes: 'null'}"])
    assert config.data.label_map == {"pos": "positive", "no": None, "0": "zero", "yes": "null"}
    for override, said in (
        ("data.label_map={}", "names no label"),
        ("data.test_fraction=0", "must lie between 0 and 1"),
        ("data.test_fraction=0.9", "leaves nothing to train on beside data.eval_fraction=0.1"),
    ):
        with pytest.raises(UserError, match=said):
            load_config(None, [override])
    with pytest.raises(UserError, match="leave out one of them"):
        load_config(None, ["data.test_fraction=0.1", "data.test=a.csv"])
    with pytest.raises(UserError, match=r"did you mean 'data\.test'"):
        load_config(None, ["data.test_file=a.csv"])


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        (
            "embedding",
            "data.label_map={a: b}",
            "renames labels, which embedding does not read",
        ),
        ("regression", "data.label_map={a: b}", "which regression does not read; leave it out"),
        ("masked_lm", "data.missing_label=skip", "rows of masked_lm need no label; leave it out"),
    ],
)
def test_rules_that_a_task_has_no_use_for_are_refused(name: str, override: str, said: str) -> None:
    config: RunConfig = load_config(None, [f"task.name={name}", override])
    with pytest.raises(UserError, match=said):
        settled(config, task(name))
