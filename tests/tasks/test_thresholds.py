"""Thresholds tuned on validation rows: exact, stored with the model, read back for it alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from jaxft.data.thresholds import FILE, beside, read_thresholds, thresholds_text
from jaxft.errors import UserError
from jaxft.reporting.report import report_text
from jaxft.tasks import classification, multi_label, reported
from jaxft.tasks._thresholds import f1_from, tuned

NAMES = ("a", "b", "c")


def best_f1(chances: np.ndarray, true: np.ndarray) -> float:
    """By the definition, for every set of rows that a threshold can choose; none included."""
    found = 0.0
    for cut in [*np.unique(chances), 2.0]:
        said = chances >= cut
        both = int((said & true).sum())
        found = max(found, 2 * both / max(int(said.sum() + true.sum()), 1))
    return found


def _chances(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    found = rng.random((60, 3)).astype(np.float32)
    if kind == "ties":
        return np.round(found * 4).astype(np.float32) / np.float32(4)
    if kind == "one ulp apart":
        steps = rng.integers(0, 4, (60, 3))
        return (np.float32(0.3) + steps * np.spacing(np.float32(0.3))).astype(np.float32)
    if kind == "all one":
        return np.full((60, 3), 0.7, np.float32)
    return np.where(found < 0.5, np.float32(0), np.float32(1)) if kind == "nothing but 0 and 1" else found


@pytest.mark.parametrize("kind", ["random", "ties", "one ulp apart", "all one", "nothing but 0 and 1"])
@pytest.mark.parametrize("share", [0.03, 0.4, 1.0])
def test_no_cut_has_a_higher_f1(kind: str, share: float) -> None:
    chances = _chances(kind)
    true = np.random.default_rng(4).random((60, 3)) < share
    true[0] = True
    found = tuned(chances, true, NAMES)
    for i, name in enumerate(NAMES):
        row = found["labels"][name]
        assert row["f1"] == pytest.approx(best_f1(chances[:, i], true[:, i]), abs=1e-12)
        # What it claims is what the threshold, as float32, gives.
        assert f1_from(chances[:, i], true[:, i], row["threshold"]) == pytest.approx(row["f1"], abs=1e-12)
        assert row["f1_at_half"] <= row["f1"]
        assert 0 <= row["threshold"] <= 1
        assert row["rows"] == true[:, i].sum()
    assert found["macro_f1"] == pytest.approx(np.mean([row["f1"] for row in found["labels"].values()]))


def test_a_label_without_rows_and_a_model_without_numbers_have_no_threshold() -> None:
    true = np.zeros((4, 2), bool)
    true[0, 1] = True
    found = tuned(np.full((4, 2), 0.7, np.float32), true, ("never", "once"))["labels"]
    assert found["never"] == {"threshold": None, "f1": 0.0, "f1_at_half": 0.0, "rows": 0}
    assert found["once"]["threshold"] == 0.6  # few digits, below 0.7 as float32
    nan = tuned(np.full((4, 2), np.nan, np.float32), true, ("never", "once"))["labels"]
    assert [row["threshold"] for row in nan.values()] == [None, None]


def fill(folder: Path, labels: tuple[str, ...] = NAMES, **found: float | None) -> Path:
    (folder / FILE).write_text(thresholds_text(labels, found or {"a": 0.2, "b": 0.7, "c": None}, 60))
    return folder


def test_they_come_back_as_they_were(tmp_path: Path) -> None:
    assert beside(tmp_path) == {}
    fill(tmp_path, a=0.1 + 0.2, b=1.0, c=None)
    assert read_thresholds(tmp_path, NAMES, NAMES) == {"a": 0.1 + 0.2, "b": 1.0, "c": None}
    assert beside(tmp_path) == {FILE: (tmp_path / FILE).read_text()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "has no thresholds.json"),
        ("{", "not valid JSON"),
        ([], "expected an object"),
        ({"thresholds": None}, "expected an object"),
        ({"labels": ["a", "c", "b"]}, "of a model with other labels"),
        ({"labels": None}, "of a model with other labels"),
        ({"thresholds": {"a": 0.5}}, "of a model with other labels"),
        ({"thresholds": {"a": 0.5, "b": 1.5, "c": 0.5}}, "the threshold of 'b' is 1.5"),
        ({"thresholds": {"a": 0.5, "b": "0.5", "c": 0.5}}, "the threshold of 'b' is '0.5'"),
        ({"thresholds": {"a": 0.5, "b": True, "c": 0.5}}, "the threshold of 'b' is True"),
        ({"thresholds": {"a": 0.5, "b": math.nan, "c": 0.5}}, "the threshold of 'b' is nan"),
        ({"metric": "mcc"}, "metric is 'mcc'"),
    ],
)
def test_a_file_of_another_model_or_a_broken_one_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    if change is not None:
        fill(tmp_path)
        tree = json.loads((tmp_path / FILE).read_text())
        made = change if isinstance(change, str) else json.dumps({**tree, **change} if change else change)
        (tmp_path / FILE).write_text(made)
    with pytest.raises(UserError) as caught:
        multi_label.Task(NAMES).decided(tmp_path, print)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tasks_decide_by_what_is_stored(tmp_path: Path) -> None:
    notes: list[str] = []
    made = multi_label.Task(NAMES, threshold=0.4).decided(fill(tmp_path), notes.append)
    assert made.threshold == (0.2, 0.7, 0.4)
    assert notes == ["no validation row could tune a threshold of c: 0.4 is used"]
    assert isinstance(hash(made), int)
    chances = np.array([0.2, 0.69, 0.5], np.float32)
    answer = made.answer(["text"], [(cast(Any, None), {"probabilities": chances})])
    assert answer.record["labels"] == ["a", "c"]

    pair = classification.Task(("no", "yes"))
    assert pair.decided(fill(tmp_path, ("no", "yes"), yes=0.9), print).threshold == 0.9
    with pytest.raises(UserError, match="other labels"):
        classification.Task(("yes", "no")).decided(tmp_path, print)
    with pytest.raises(UserError, match="models of two labels; this one has 3"):
        classification.Task(NAMES).decided(tmp_path, print)


def test_reports_tell_them_of_validation_rows_and_not_of_a_test() -> None:
    rng = np.random.default_rng(5)
    margins, labels = rng.normal(size=(50, 3)).astype(np.float32), (rng.random((50, 3)) < 0.3).astype(np.int8)
    outputs = {"margins": margins, "chances": 1 / (1 + np.exp(-margins)), "labels": labels}
    scores = {"loss": 1.0, "macro_f1": 0.5}
    found = reported(multi_label.Task(NAMES), scores, outputs)
    text = report_text(found, NAMES, [], colour=False)
    table: Any = found["thresholds"]
    assert table["tuned_on_these_rows"]
    assert "tuned on these very rows: other rows will score less" in text
    row = table["labels"]["b"]
    line = next(line for line in text.splitlines() if line.startswith("b "))
    assert line.split() == [
        "b",
        f"{row['threshold']:.8g}",
        f"{row['f1_at_half']:.4f}",
        f"{row['f1']:.4f}",
        str(row["rows"]),
    ]
    assert "thresholds" not in reported(multi_label.Task(NAMES), scores, outputs, test=True)
