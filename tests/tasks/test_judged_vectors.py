"""Rows of sentence embeddings as they are told, and how bad each is: counted again by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from jaxft.config.tasks.embedding import Config, Loss
from jaxft.data.sources.rows import Row, Value
from jaxft.tasks import embedding, mistakes


def rows_of(count: int, negatives: int = 0, numbers: Sequence[float] | None = None) -> list[Row]:
    """Rows with a text, a partner, negatives and perhaps a number; text 3 is asked twice, and two rows share a partner."""
    found = []
    for i in range(count):
        texts: list[object] = [f"query {3 if i == 7 else i}", f"partner {5 if i == 6 else i}"]
        texts += [[f"negative {i}.{k}" for k in range(negatives)]] if negatives else []
        values = (*texts, *(() if numbers is None else (numbers[i],)))
        found.append(Row(cast("tuple[Value, ...]", values), f"f:{i}"))
    return found


def outputs_of(rows: Sequence[Row], rng: np.random.Generator, negatives: int = 0) -> dict[str, np.ndarray]:
    """Vectors of the texts of rows, one for each different text."""
    numbers: dict[object, int] = {}
    said = []
    for row in rows:
        others = row.values[2] if negatives else []
        assert isinstance(others, list)
        said.append([numbers.setdefault(text, len(numbers)) for text in (*row.values[:2], *others)])
    texts = np.array(said)
    vectors = rng.normal(size=(len(numbers), 6)).astype(np.float32)[texts]
    return {"vectors": vectors, "texts": texts, "weights": np.ones(len(rows), np.float32)}


def mixed(outputs: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outputs as batches give them, in another order."""
    order = rng.permutation(len(outputs["texts"]))
    return {name: values[order] for name, values in outputs.items()}, order


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(float), b.astype(float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("negatives", [0, 2])
def test_the_wrong_text_that_is_nearest_is_shown(negatives: int) -> None:
    rng = np.random.default_rng(negatives)
    rows = rows_of(12, negatives)
    outputs = outputs_of(rows, rng, negatives)
    columns = ("negatives",) if negatives else ()
    task = embedding.Task(Config(name="embedding", loss="ranking", negatives=columns))
    scrambled, order = mixed(outputs, rng)
    told = list(task.judged(scrambled, [row.values for row in rows], order))
    shown = {
        int(number): text
        for row, of_row in zip(rows, outputs["texts"], strict=True)
        for number, text in zip(of_row, embedding_texts(row), strict=True)
    }
    vector = dict(zip(outputs["texts"].ravel().tolist(), outputs["vectors"].reshape(-1, 6), strict=True))
    candidates = set(outputs["texts"][:, 1:].ravel().tolist())
    for number, (row, one) in enumerate(zip(rows, told, strict=True)):
        query = outputs["texts"][number, 0]
        right = {int(texts[1]) for texts in outputs["texts"] if texts[0] == query}
        mine = cosine(*outputs["vectors"][number, :2])
        wrong = {other: cosine(vector[query], vector[other]) for other in candidates - right}
        nearest = max(wrong, key=lambda other: wrong[other])
        assert (one["text"], one["pair"]) == row.values[:2]
        assert one["similarity"] == pytest.approx(mine, abs=1e-6)
        assert one["nearest"] == shown[nearest]
        assert one["nearest_similarity"] == pytest.approx(wrong[nearest], abs=1e-6)
        assert one["place"] == 1 + sum(other >= mine for other in wrong.values())
        assert one["right"] == (one["place"] == 1)
        how = task.wrongness(one)
        assert how == (None if one["right"] else pytest.approx(wrong[nearest] - mine, abs=2e-6))
    worst, count = mistakes(task, scrambled, rows, order, 100)
    assert count == sum(not one["right"] for one in told) > 3
    gaps = [float(str(one["nearest_similarity"])) - float(str(one["similarity"])) for one in worst]
    assert gaps == sorted(gaps, reverse=True)


def embedding_texts(row: Row) -> list[object]:
    return [text for value in row.values for text in (value if isinstance(value, list) else [value])]


def test_a_triplet_is_wrong_if_its_own_hardest_negative_is_nearer() -> None:
    rng = np.random.default_rng(5)
    rows = rows_of(30, 3)
    outputs = outputs_of(rows, rng, 3)
    outputs["texts"][4, 3:] = -1  # a row with one negative alone
    outputs["texts"][5, 2:] = -1
    task = embedding.Task(Config(name="embedding", loss="triplet", negatives=("negatives",)))
    scrambled, order = mixed(outputs, rng)
    told = list(task.judged(scrambled, [row.values for row in rows], order))
    for number, (row, one) in enumerate(zip(rows, told, strict=True)):
        if number == 5:
            assert (one["negative"], one["right"], task.wrongness(one)) == (None, True, None)
            continue
        near = [cosine(outputs["vectors"][number, 0], other) for other in outputs["vectors"][number, 1:]]
        there = near[1:2] if number == 4 else near[1:]
        assert one["negative"] == embedding_texts(row)[2 + int(np.argmax(there))]
        assert one["negative_similarity"] == pytest.approx(max(there), abs=1e-6)
        assert task.wrongness(one) == (None if near[0] > max(there) else pytest.approx(max(there) - near[0], abs=2e-6))
    assert {one["right"] for one in told} == {True, False}


@pytest.mark.parametrize("loss", ["cosine", "cosent", "margin_mse"])
def test_rows_with_numbers_are_off_by_what_their_loss_is_of(loss: Loss) -> None:
    rng = np.random.default_rng(2)
    numbers = [0.0, 1.0, 1.0, 0.25, 0.5, 0.75, 0.5, 1.0]
    negatives = 1 if loss == "margin_mse" else 0
    rows = rows_of(8, negatives, numbers)
    outputs = {**outputs_of(rows, rng, negatives), "labels": np.array(numbers, np.float32)}
    task = embedding.Task(Config(name="embedding", loss=loss, negatives=("negatives",) if negatives else ()))
    scrambled, order = mixed(outputs, rng)
    told = list(task.judged(scrambled, [row.values for row in rows], order))
    near = [cosine(*vectors[:2]) for vectors in outputs["vectors"]]
    for number, (one, true) in enumerate(zip(told, numbers, strict=True)):
        assert (one["true"], one["similarity"]) == (true, pytest.approx(near[number], abs=1e-6))
        if loss == "cosine":
            off = near[number] - true
        elif loss == "margin_mse":
            query, right, wrong = outputs["vectors"][number].astype(float)
            off = float(query @ right - query @ wrong) - true
        else:
            below = sum(other < true for other in numbers)
            place = 1 + below + (sum(other == true for other in numbers) - 1) / 2
            off = 1 + sum(other < near[number] for other in near) - place
        assert one["error"] == pytest.approx(off, abs=1e-5)
        assert task.wrongness(one) == (abs(float(str(one["error"]))) if off else None)


def test_vectors_that_are_not_numbers_are_the_worst_and_a_student_is_never_right() -> None:
    rng = np.random.default_rng(3)
    rows = rows_of(6)
    outputs = outputs_of(rows, rng)
    outputs["vectors"][2] = np.nan
    task = embedding.Task(Config(name="embedding", loss="ranking"))
    (first, *_), _ = mistakes(task, outputs, rows, np.arange(6), 10)
    assert (first["text"], first["similarity"]) == ("query 2", None)
    taught = {**outputs_of(rows, rng), "teacher": rng.normal(size=(6, 6)).astype(np.float32)}
    student = embedding.Task(Config(name="embedding", loss="distillation", teacher_width=6))
    worst, count = mistakes(student, taught, [Row((row.values[0], [0.0]), "") for row in rows], np.arange(6), 3)
    pairs = zip(taught["vectors"], taught["teacher"], strict=True)
    near = sorted(float(np.mean([cosine(one, teacher) for one in vectors])) for vectors, teacher in pairs)
    assert count == 6
    assert [one["similarity"] for one in worst] == pytest.approx(near[:3], abs=1e-6)


def test_one_pair_alone_has_nothing_in_its_way() -> None:
    rows = rows_of(1)
    outputs = outputs_of(rows, np.random.default_rng(0))
    task = embedding.Task(Config(name="embedding", loss="ranking"))
    (one,) = task.judged(outputs, [row.values for row in rows], np.arange(1))
    assert (one["place"], one["nearest"], one["right"]) == (1, None, True)
    assert task.wrongness(one) is None
