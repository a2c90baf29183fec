"""Several texts in one row: which ones, in which order, and what of a row in memory a packed row keeps."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.batch import text_fields
from jaxft.data.examples import Split, offsets_of, stable_order
from jaxft.data.packing import pack


def split_of(lengths: list[int]) -> Split:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    columns = {"tokens": tokens, "types": tokens % 2}
    return Split("train", text_fields(0), columns, {"length": offsets_of(np.array(lengths))})


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """The rule, text by text: longest first, to the row that it leaves the least room in; of several, the one that came to it last."""
    rows: list[list[int]] = []
    left: list[int] = []
    came: list[int] = []
    for time, text in enumerate(sorted(range(len(lengths)), key=lambda text: -lengths[text])):
        able = [row for row in range(len(rows)) if left[row] >= max(lengths[text], 1)]
        row = min(able, key=lambda row: (left[row], -came[row]), default=len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
            came.append(0)
        rows[row].append(text)
        left[row] -= lengths[text]
        came[row] = time
    return rows


@settings(max_examples=80)
@given(
    st.integers(1, 24).flatmap(
        lambda room: st.tuples(st.just(room), st.lists(st.integers(0, room), min_size=1, max_size=60))
    )
)
def test_texts_go_where_they_fit_most_closely(case: tuple[int, list[int]]) -> None:
    room, lengths = case
    split = split_of(lengths)
    packed, rows = pack(split, room), best_fit(lengths, room)
    assert len(packed) == len(rows)
    assert packed.sizes("length").tolist() == [sum(lengths[text] for text in row) for row in rows]
    found = hashlib.sha256(offsets_of(packed.sizes("length")).data)
    for name in ("tokens", "types", "segments", "positions"):
        for i, row in enumerate(rows):
            expected = {
                "segments": np.concatenate(
                    [np.full(lengths[text], n, np.int32) for n, text in enumerate(row, start=1)]
                ),
                "positions": np.concatenate([np.arange(lengths[text], dtype=np.int32) for text in row]),
                **{one: np.concatenate([split[text][one] for text in row]) for one in ("tokens", "types")},
            }[name]
            assert packed[i][name].dtype == np.int32
            assert np.array_equal(packed[i][name], expected)
            found.update(expected.data)
    # What versions before this one hashed is still known; other rows are not.
    assert packed.is_of(found.hexdigest())
    assert packed.is_of(packed.digest())
    other = pack(split_of([*lengths, 1]), room)
    assert not other.is_of(found.hexdigest())
    assert not other.is_of(packed.digest())


def test_the_hash_tells_how_texts_are_put_together() -> None:
    split = split_of([3, 2, 1, 3])
    assert pack(split, 4).digest() != pack(split, 6).digest()
    narrow = Split(
        "train", split.fields, {**split.columns, "types": split.columns["types"].astype(np.uint8)}, split.offsets
    )
    old = pack(split, 4)._hash_of_rows()
    assert pack(narrow, 4).is_of(old)


@given(st.lists(st.integers(0, 2**40), max_size=80))
def test_a_stable_order(values: list[int]) -> None:
    array = np.array(values, np.int64)
    assert np.array_equal(stable_order(array), np.argsort(array, kind="stable"))
