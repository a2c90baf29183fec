"""`jaxft data`: labels, lengths, duplicates and rows as the loader will see them; and training's word about held-out rows that it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_folder, refusal, run

from jaxft.data.batch import Field, text_fields
from jaxft.data.duplicates import duplicates
from jaxft.data.examples import Encoded, Split, make_split
from jaxft.reporting.data_text import bars, label_lines, length_lines

Capture = pytest.CaptureFixture[str]
FIELDS = {**text_fields(0), "labels": Field(("batch",))}


def split_of(rows: list[tuple[list[int], int]], name: str = "train") -> Split:
    examples = (
        {
            "tokens": np.array(tokens, np.int32),
            "types": np.zeros(len(tokens), np.int32),
            "labels": np.array(label, np.int32),
        }
        for tokens, label in rows
    )
    return make_split(name, (Encoded(one, i) for i, one in enumerate(examples)), FIELDS)


def test_duplicates_are_those_of_a_search() -> None:
    rng = np.random.default_rng(0)
    texts = [([int(x) for x in rng.integers(0, 3, rng.integers(1, 4))], int(rng.integers(2))) for _ in range(300)]
    train, held = texts[:200], texts[200:]
    found = duplicates(split_of(train), split_of(held, "eval"))
    tokens = [one for one, _ in train]
    assert found.shared.tolist() == [i for i, (one, _) in enumerate(held) if one in tokens]
    assert found.twins.tolist() == [tokens.index(one) for one, _ in held if one in tokens]
    again = [i for i, one in enumerate(tokens) if one in tokens[:i]]
    assert found.repeated == len(again)
    assert found.contradicted == sum(train[i][1] != train[tokens.index(tokens[i])][1] for i in again)


def test_texts_of_other_pieces_are_no_duplicates() -> None:
    found = duplicates(split_of([([1, 2], 0), ([1], 0), ([2], 0)]), split_of([([1, 2, 2], 0), ([2, 1], 0)], "eval"))
    assert (len(found.shared), found.repeated, found.contradicted) == (0, 0, 0)


def test_bars_and_counts() -> None:
    assert bars([("a", 30), ("bb", 10)], block="#") == [
        f"  a         30   75.0%  {'#' * 40}",
        f"  bb        10   25.0%  {'#' * 13}",
    ]
    many = label_lines([str(i) for i in range(50)], list(range(50)))
    assert len(many) == 30
    assert many[0].split()[:3] == ["49", "49", "4.0%"]  # of all, not of those that are shown
    assert many[-1] == f"  and 21 more, {sum(range(21))} in all"
    lines = length_lines(np.array([1, 8, 9, 16, 33]), (8, 16, 32, 64), block="#")
    assert [line.split()[:2] for line in lines] == [["1-8", "2"], ["9-16", "2"], ["33-64", "1"]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(capsys: Capture, folder: Path, *more: str) -> str:
    train = [
        ("the cat", "old", 1),
        ("a dog", "new", 2),
        ("the cat", "old", 3),
        ("a bird sings", "small", 4),
        ("red fish", "big", 5),
    ]
    held = [("the cat", "old", 1), ("blue fish", "big", 2)]
    made = [
        write(
            folder / f"{name}.jsonl", [{"text": a, "pair": b, "score": n, "label": "xyxyy"[n - 1]} for a, b, n in rows]
        )
        for name, rows in (("train", train), ("eval", held))
    ]
    code, out, err = run(
        capsys, "data", f"model.init={make_folder(folder / 'source', None)}", f"data.train={made[0]}", f"data.eval={made[1]}",
        "data.max_length=32", *more,
    )  # fmt: skip
    assert code == 0, err
    return out


def test_a_run_is_shown_as_the_loader_sees_it(tmp_path: Path, capsys: Capture) -> None:
    out = said(capsys, tmp_path, "data.text_pair=pair", "--rows", "2")
    assert "train: 5 rows" in out
    assert [line.split()[:3] for line in out.splitlines() if "%" in line and line.startswith("  ")][:2] == [
        ["y", "3", "60.0%"],
        ["x", "2", "40.0%"],
    ]
    assert "duplicates: 1 training rows were there before; 1 of 2 held-out rows are training rows as well" in out
    assert "for instance held-out example 0 and training example 0" in out
    assert "training example 0:\n  6 tokens, label x\n    [CLS] | the | cat | [SEP] | old | [SEP]\n" in out
    assert "    types: 0 of tokens 0-3, 1 of tokens 4-5\n" in out
    assert "training example 2" not in out
    assert not list(tmp_path.glob("runs*"))


def test_contradictions_and_numbers(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    out = said(capsys, tmp_path / "a", "task.name=regression", "data.label=score")
    assert "score: 1 to 5, mean 3" in out
    assert "1 training rows were there before (1 with another label)" in out
    assert "4 tokens, score 1\n" in out
    out = said(capsys, tmp_path / "b", "task.name=masked_lm", "--rows", "0")
    assert "labels" not in out
    assert "padding: " in out


def test_training_says_so_too(tmp_path: Path, capsys: Capture) -> None:
    said(capsys, tmp_path)
    code, out, err = run(
        capsys, "train", f"model.init={tmp_path / 'source'}", f"data.train={tmp_path / 'train.jsonl'}", "data.max_length=32",
        f"data.eval={tmp_path / 'eval.jsonl'}", f"train.out={tmp_path / 'no'}", "train.batch_size=8", "eval.metric=bleu",
    )  # fmt: skip
    assert "warning: 1 of 2 held-out rows are training rows as well" in out
    assert (code, "eval.metric='bleu'" in err) == (2, True)  # nothing had to be compiled to see it


def test_rows_that_cannot_be(tmp_path: Path, capsys: Capture) -> None:
    assert "--rows -1: must be at least 0" in refusal(capsys, "data", "--rows", "-1")
    assert "data.train is not set" in refusal(capsys, "data", f"model.init={make_folder(tmp_path / 'source', None)}")
