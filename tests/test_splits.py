"""The splits of a run: where the rows of each come from, what they have in common, what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_folder, run
from tiny_run import WORDS, write_tokenizer

from jaxft import tasks
from jaxft.config import load_config
from jaxft.errors import UserError
from jaxft.training.caching import build_caches
from jaxft.training.processors import processor_of
from jaxft.training.rows import Rows, open_rows
from jaxft.training.setup import settled


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_tokenizer(folder / "tokenizer")
    words = [word for word in WORDS if not word.startswith("[")]
    for name, first, count in (("train", 0, 60), ("eval", 60, 12), ("test", 66, 10)):
        rows = [
            {"text": f"{words[i % 38]} {words[i // 38]}", "label": "xyz"[i % 3], "who": f"c{i // 4}"}
            for i in range(first, first + count)
        ]
        (folder / f"{name}.json").write_text(json.dumps({"data": rows}))
    return folder


def opened(home: Path, *more: str) -> tuple[Rows, list[str]]:
    config = load_config(None, [
        "model.family=bert", f"data.tokenizer={home / 'tokenizer'}", f"data.train={home / 'train.json'}", *more
    ])  # fmt: skip
    module, notes = tasks.task(config.task.name), list[str]()
    found = open_rows(settled(config, module), module, processor_of(config, None), None, notes.append)
    return found, [note.replace(f"{home}/", "") for note in notes]


def test_a_test_is_named_or_held_out(home: Path) -> None:
    without, _ = opened(home)
    assert without.test is None
    assert [(split.name, count) for split, count in without.splits] == [("train", 54), ("eval", 6)]
    named, _ = opened(home, f"data.test={home / 'test.json'}")
    assert named.test is not None
    assert named.test.count == 10
    # What is trained on, and what is held out for it, do not change.
    assert named.train.digest() == without.train.digest()
    assert named.eval.split.digest() == without.eval.split.digest()
    part, notes = opened(home, "data.test_fraction=0.2")
    assert [(split.name, count) for split, count in part.splits] == [("train", 42), ("eval", 6), ("test", 12)]
    assert part.eval.split.digest() == without.eval.split.digest()
    assert notes == ["train.json: held out at random: 0.1 for eval, 0.2 for test of each label"]
    beside, _ = opened(home, "data.test_fraction=0.2", f"data.eval={home / 'eval.json'}")
    assert [count for _, count in beside.splits] == [48, 12, 12]


def test_groups_on_two_sides_are_said(home: Path) -> None:
    _, notes = opened(
        home, f"data.eval={home / 'eval.json'}", f"data.test={home / 'test.json'}", "data.split_group=who"
    )
    assert notes == ["warning: 2 of the 3 groups of test are groups of eval as well: c16, c17"]
    held, notes = opened(home, "data.test_fraction=0.2", "data.split_group=who")
    assert [count for _, count in held.splits] == [44, 4, 12]
    assert notes == [
        "train.json: held out by whole groups: eval 1 of 15 groups, 6.7% of the rows; test 3 of 15 groups, 20.0% of the rows"
    ]


def test_caches_hold_a_test_too(home: Path, tmp_path: Path) -> None:
    config = load_config(None, [
        "model.family=bert", f"data.tokenizer={home / 'tokenizer'}", f"data.train={home / 'train.json'}",
        "data.test_fraction=0.2", "data.split_group=who",
    ])  # fmt: skip
    folders = build_caches(config, tmp_path / "caches", lambda text: None)
    assert [folder.name for folder in folders] == ["train", "eval", "test"]
    files, _ = opened(home, "data.test_fraction=0.2", "data.split_group=who")
    named = [f"data.{folder.name}={folder}" for folder in folders]
    cached, _ = opened(home, *named)
    for (ours, _), (theirs, _) in zip(cached.splits, files.splits, strict=True):
        assert ours.digest() == theirs.digest()
    with pytest.raises(UserError, match=r"a token cache, of which no rows can be held out; set data\.test, to a cache"):
        opened(home, *named[:2], "data.test_fraction=0.1")


def test_what_a_run_will_see_of_its_splits(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(
        json.dumps(
            [*json.loads((home / "train.json").read_text())["data"][:5], {"text": "a dog", "label": None, "who": "c1"}]
        )
    )
    code, out, err = run(
        capsys, "data", f"model.init={make_folder(tmp_path / 'source', None)}", f"data.train={home / 'train.json'}",
        f"data.test={tmp_path / 'more.json'}", "data.missing_label=skip", "data.split_group=who",
        "data.label_map={x: X, z: null}", f"data.tokenizer={home / 'tokenizer'}", "--rows", "0",
    )  # fmt: skip
    assert code == 0, err
    for line in (
        "train.json: 20 of 60 rows are left out by data.label_map: 'z' (20)",
        "train.json: data.label_map: 'x' is 'X' (20 rows)",
        "train.json: held out by whole groups: eval 1 of 15 groups, 7.5% of the rows",
        "more.json: 1 of 6 rows have no label and are left out",
        "2 of the 2 groups of test are groups of train as well",
        "test: 4 rows, ",
        f"labels of rows by split:\n{'train':>20}{'eval':>17}{'test':>17}\n  ",
        "duplicates: 0 training rows were there before; 0 of 3 held-out rows",
        "4 of 4 test rows are training rows as well",
    ):
        assert line in out, line
