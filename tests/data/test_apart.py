"""Rows that share a value are dealt into different batches."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.apart import keep_apart
from jaxft.data.batch import Field, text_fields
from jaxft.data.examples import Split
from jaxft.data.loader import Batches

PAIRS = st.lists(st.tuples(st.integers(0, 12), st.integers(20, 60)), min_size=2, max_size=60)


def twice(batches: list[np.ndarray], values: list[frozenset[int]]) -> int:
    """How many values are more than once in a batch, over all batches."""
    counts = [Counter(value for row in batch.tolist() for value in values[row]) for batch in batches]
    return sum(count - 1 for counter in counts for count in counter.values())


@settings(max_examples=60)
@given(PAIRS, st.integers(2, 9))
def test_rows_change_places_and_no_batch_gets_worse(pairs: list[tuple[int, int]], size: int) -> None:
    values = [frozenset(pair) for pair in pairs]
    before = np.split(np.arange(len(pairs)), range(size, len(pairs), size))
    after = keep_apart(before, values.__getitem__)
    assert [len(batch) for batch in after] == [len(batch) for batch in before]
    assert sorted(np.concatenate(after)) == list(range(len(pairs)))
    assert twice(after, values) <= twice(before, values)
    assert all(
        np.array_equal(one, other) for one, other in zip(after, keep_apart(before, values.__getitem__), strict=True)
    )


def test_each_question_three_times_and_none_twice_in_a_batch() -> None:
    values = [frozenset([row // 3, 1000 + row]) for row in range(320)]
    before = np.split(np.arange(320), 20)
    assert twice(before, values) > 150
    assert twice(keep_apart(before, values.__getitem__), values) == 0


def test_a_value_of_more_rows_than_batches_stays_with_the_rest_apart() -> None:
    values = [frozenset([0]) if row < 7 else frozenset([row]) for row in range(12)]
    after = keep_apart(np.split(np.arange(12), 3), values.__getitem__)
    assert twice(after, values) == 7 - 3


def pairs_of(texts: list[list[int]], lengths: list[int], *, apart: bool) -> Split:
    fields = {**text_fields(0), "texts": Field(("batch", 2), fill=-1, apart=apart)}
    offsets = {"length": np.cumsum([0, *lengths])}
    columns = {
        "tokens": np.ones(sum(lengths), np.int32),
        "types": np.zeros(sum(lengths), np.int32),
        "texts": np.array(texts, np.int32),
    }
    return Split("train", fields, columns, offsets)


def test_training_batches_hold_no_text_twice() -> None:
    rng = np.random.default_rng(0)
    texts = [[row // 4, 5000 + row if row % 9 else -1] for row in range(900)]
    split = pairs_of(texts, rng.integers(1, 17, 900).tolist(), apart=True)
    batches = Batches(split, 8, (8, 16), 3)
    seen: list[int] = []
    for step in range(2 * batches.steps_per_epoch):
        rows = batches.rows_of(step).tolist()
        seen += rows
        counts = Counter(text for row in rows for text in texts[row] if text >= 0)
        assert max(counts.values()) == 1
    assert Counter(seen) == dict.fromkeys(range(900), 2)
    usual = Batches(pairs_of(texts, split.sizes("length").tolist(), apart=False), 8, (8, 16), 3)
    padded = [sum(one.shape_of(step).tokens for step in range(100)) for one in (usual, batches)]
    assert padded[1] < 1.1 * padded[0]
    assert any(not np.array_equal(usual.rows_of(step), batches.rows_of(step)) for step in range(20))


def test_evaluation_stays_in_order_of_length() -> None:
    split = pairs_of([[0, 1]] * 6, [6, 5, 4, 3, 2, 1], apart=True)
    rows = np.concatenate([Batches(split, 2, (8,), None).rows_of(step) for step in range(3)])
    assert all(a > b for a, b in pairwise(rows.tolist()))
