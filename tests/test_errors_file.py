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
from jaxft.tasks import (
    classification,
    judges,
    mistakes,
    multi_label,
    multiple_choice,
    preference,
    question_answering,
    regression,
    reranking,
    seq2seq,
    speech_to_text,
)
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
        (multiple_choice.Task, {"right": False, "probability": 0.25}, 0.75),
        (multiple_choice.Task, {"right": False, "probability": None}, np.inf),
        (multiple_choice.Task, {"right": True, "probability": 0.5}, None),
        (preference.Task, {"right": False, "margin": -1.5}, 1.5),
        (preference.Task, {"right": False, "margin": None}, np.inf),
        (preference.Task, {"right": None, "margin": None}, None),
        (preference.Task, {"right": True, "margin": 0.5}, None),
        (seq2seq.Task, {"right": False, "rougeL": 25.0}, 75.0),
        (seq2seq.Task, {"right": False, "chrf": 30.0}, 70.0),
        (speech_to_text.Task, {"right": False, "wer": 150.0}, 150.0),
        (speech_to_text.Task, {"right": False, "wer": None}, np.inf),
        (speech_to_text.Task, {"right": True, "wer": 0.0}, None),
    ],
)
def test_how_bad_an_answer_is(task: Any, judged: dict[str, object], wrongness: float | None) -> None:
    assert task.wrongness(object.__new__(task), judged) == wrongness


class Words:
    """Ids are places in a list of words."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(["the", "cat", "sat", "on", "a", "mat"][i] for i in ids)


@pytest.mark.parametrize(
    ("module", "scores", "name", "found"),
    [
        (seq2seq, ("rouge", "bleu"), "rougeL", [100.0, 50.0, 0.0]),
        (seq2seq, ("bleu",), "chrf", None),
        (speech_to_text, ("wer",), "wer", [0.0, 50.0, None]),
    ],
)
def test_texts_that_are_written_are_told_beside_those_wanted(
    module: Any, scores: tuple[str, ...], name: str, found: list[float | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seq2seq, "Decoding", Words)
    task = module.Task(scores=scores, tokenizer=Words())
    wanted = ["the cat", "a cat", ""]
    rows = [Row((f"source {i}" if i else b"sound", text), "") for i, text in enumerate(wanted)]
    # As batches give them: another order, and -1 behind the end.
    outputs = {"row": np.array([2, 0, 1]), "written": np.array([[2, -1], [0, 1], [0, 1]]), "weights": np.ones(3)}
    told = list(task.judged(outputs, [row.values for row in rows], np.array([2, 0, 1])))
    assert [one["text"] for one in told] == ["row 0", "source 1", "source 2"]
    assert [(one["true"], one["written"]) for one in told] == list(
        zip(wanted, ["the cat", "the cat", "sat"], strict=True)
    )
    assert [one["right"] for one in told] == [True, False, False]
    if found is not None:
        assert [one[name] for one in told] == found
    worst, count = mistakes(task, outputs, rows, np.array([2, 0, 1]), 5)
    assert ([one["text"] for one in worst], count) == (["source 2", "source 1"], 2)
    assert judges(task)
    assert not judges(module.Task(scores=()))


def test_pairs_of_replies_are_told_with_their_margin() -> None:
    task = preference.Task(preference.Config(name="preference", prompt="prompt"))
    rows = [Row((f"p{i}", f"good {i}", [{"role": "assistant", "content": "bad"}]), "") for i in range(4)]
    rewards = np.array([[1.0, 0.5], [0.25, 1.0], [0.0, 2.0], [3.0, np.nan]], np.float32)
    order = np.array([3, 1, 0, 2])
    outputs = {"rewards": rewards[order], "counted": np.array([1, 1, 0, 1])[order], "weights": np.ones(4)}
    told = list(task.judged(outputs, [row.values for row in rows], order))
    assert [one["right"] for one in told] == [True, False, None, False]
    assert [one["margin"] for one in told] == [0.5, -0.75, None, None]
    assert told[0] | {"rejected": ""} == {
        "prompt": "p0", "chosen": "good 0", "rejected": "", "chosen_reward": 1.0, "rejected_reward": 0.5, "margin": 0.5, "right": True,
    }  # fmt: skip
    assert told[1]["rejected"] == '[{"role": "assistant", "content": "bad"}]'
    worst, count = mistakes(task, outputs, rows, order, 5)
    assert ([one["prompt"] for one in worst], count) == (["p3", "p1"], 2)


def test_answers_to_choose_from_are_told_by_their_words() -> None:
    task = multiple_choice.Task(2)
    rows = [Row(("q0", "before", ["a", "b"], "c", 2), ""), Row(("q1", "before", ["d", "e"], "f", 0), "")]
    shares = np.array([[0.7, 0.1, 0.2], [0.5, 0.25, 0.25]], np.float32)
    outputs = {"probabilities": shares[::-1], "labels": np.array([0, 2]), "weights": np.ones(2)}
    first, second = task.judged(outputs, [row.values for row in rows], np.array([1, 0]))
    assert (first["true"], first["choice"], first["true_answer"], first["answer"], first["right"]) == (
        2,
        0,
        "c",
        "a",
        False,
    )
    assert (second["answer"], second["true_answer"], second["right"]) == ("d", "d", True)


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
