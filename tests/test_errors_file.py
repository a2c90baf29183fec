"""errors.csv: the worst mistakes, in the order of how bad they are, beside the texts that they are of."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.cli.row_files import write_errors
from jaxft.data.batch import Field, text_fields
from jaxft.data.examples import Encoded, make_split
from jaxft.data.packing import pack
from jaxft.data.sources.rows import Row
from jaxft.tasks import classification, mistakes, multi_label, question_answering, regression, reranking
from jaxft.tasks import token_classification as tagging
from jaxft.training.packing import examples_of

TASK = classification.Task(("a", "b", "c"))


def evaluated(count: int) -> tuple[dict[str, np.ndarray], list[Row], np.ndarray]:
    """Outputs of rows in a mixed-up order, their probabilities all different."""
    rng = np.random.default_rng(0)
    order = rng.permutation(count)
    labels, predicted = rng.integers(3, size=(2, count))
    rows = [Row((f"text {i}", "abc"[label]), f"row {i}") for i, label in enumerate(labels)]
    outputs = {"labels": labels, "predicted": predicted, "probability": rng.permutation(count) / count}
    return {name: values[order] for name, values in outputs.items()}, rows, order


@pytest.mark.parametrize("most", [1, 7, 500])
def test_the_most_confident_mistakes_come_first(most: int) -> None:
    outputs, rows, order = evaluated(60)
    worst, wrong = mistakes(TASK, outputs, rows, order, most)
    judged = TASK.judged(outputs, [row.values for row in rows], order)
    expected = sorted((one for one in judged if not one["right"]), key=lambda one: -float(str(one["probability"])))
    assert wrong == len(expected) > 20
    assert worst == expected[:most]
    assert all(
        one["text"] == f"text {rows.index(row)}" for one in worst for row in rows if row.values[0] == one["text"]
    )


def test_equally_bad_mistakes_keep_the_order_of_the_rows() -> None:
    rows = [Row((f"text {i}", "a"), "") for i in range(9)]
    outputs = {"labels": np.zeros(9, int), "predicted": np.ones(9, int), "probability": np.full(9, 0.5)}
    worst, _ = mistakes(TASK, outputs, rows, np.arange(9), 4)
    assert [one["text"] for one in worst] == ["text 0", "text 1", "text 2", "text 3"]


def test_what_is_written_and_what_is_not(tmp_path: Path) -> None:
    outputs, rows, order = evaluated(900)
    (line,) = write_errors(tmp_path, TASK, outputs, rows, order)
    with open(tmp_path / "errors.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    wrong = int((outputs["labels"] != outputs["predicted"]).sum())
    assert line == f"wrote {tmp_path / 'errors.csv'}: the worst 200 of {wrong} mistakes in 900 rows, the worst first"
    assert (len(table), list(table[0])) == (200, ["text", "true", "predicted", "probability", "right"])
    # A file of an earlier evaluation does not stay.
    assert write_errors(tmp_path, TASK, outputs, [], order) == [
        "no errors.csv: data.eval is a token cache, which holds no texts"
    ]
    assert not list(tmp_path.iterdir())
    write_errors(tmp_path, TASK, outputs, rows, order, split="test")
    outputs["predicted"] = outputs["labels"]
    assert write_errors(tmp_path, TASK, outputs, rows, order, split="test") == [
        "no errors_test.csv: none of the 900 rows is wrong"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "judged", "wrongness"),
    [
        (classification.Task, {"right": False, "probability": 0.75}, 0.75),
        (classification.Task, {"right": False, "probability": None}, 0.0),
        (classification.Task, {"right": True, "probability": 0.75}, None),
        (multi_label.Task, {"right": False, "wrong": 3}, 3.0),
        (multi_label.Task, {"right": True, "wrong": 0}, None),
        (regression.Task, {"error": -0.5}, 0.5),
        (regression.Task, {"error": 0.0}, None),
        (regression.Task, {"error": None}, np.inf),
        (reranking.Task, {"true": 1.0, "score": 0.25}, 0.75),
        (reranking.Task, {"true": 1.0, "score": 0.5}, None),
        (question_answering.Task, {"right": False, "f1": 0.25}, 0.75),
        (question_answering.Task, {"right": True, "f1": 1.0}, None),
        (tagging.Task, {"right": False, "true": "O B-X I-X", "predicted": "B-X B-X O"}, 2.0),
        (tagging.Task, {"right": True, "true": "O", "predicted": "O"}, None),
    ],
)
def test_how_bad_an_answer_is(task: Any, judged: dict[str, object], wrongness: float | None) -> None:
    assert task.wrongness(object.__new__(task), judged) == wrongness


def test_rows_that_are_packed_are_told_apart() -> None:
    lengths = [3, 9, 2, 5, 7, 1, 4]
    examples = (
        Encoded({"tokens": np.full(n, i, np.int32), "types": np.zeros(n, np.int32), "labels": np.array(i, np.int32)}, i)
        for i, n in enumerate(lengths)
    )
    split = make_split("eval", examples, {**text_fields(0), "labels": Field(("batch",))})
    packed, order = pack(split, 10), np.array([1, 0, 2])
    assert examples_of(packed, order).tolist() == [label for row in order for label in packed[row]["labels"].tolist()]
    assert examples_of(split, order) is order
