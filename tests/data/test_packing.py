"""Several texts in one row: which ones, in which order, and what of a row in memory a packed row keeps."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.batch import Field, text_fields
from jaxft.data.examples import Split, offsets_of, stable_order
from jaxft.data.packing import best_fit_of_pairs, pack


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


def fit_of_pairs(pairs: list[tuple[int, int]], rooms: tuple[int, int]) -> list[tuple[int, int]]:
    """The rule, pair by pair, to what each row holds on both sides: those that fill a side most first, to the row of those with room for
    both that is left the least. Of several, they are of one kind."""
    rows: list[list[int]] = []

    def left(row: list[int]) -> int:
        return (rooms[0] - row[0]) * rooms[1] + (rooms[1] - row[1]) * rooms[0]

    order = sorted(pairs, key=lambda pair: (-max(pair[0] * rooms[1], pair[1] * rooms[0]), *pair))
    for source, target in order:
        able = [row for row in rows if row[0] + source <= rooms[0] and row[1] + target <= rooms[1]]
        if not able:
            rows.append([0, 0])
        row = min(able, key=left, default=rows[-1])
        row[0], row[1] = row[0] + source, row[1] + target
    return sorted((source, target) for source, target in rows)


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 7)), min_size=1, max_size=60))
def test_pairs_go_where_they_fit_on_both_sides(pairs: list[tuple[int, int]]) -> None:
    lengths, targets = np.array(pairs).T
    texts, rows = best_fit_of_pairs(lengths, targets, 12, 7)
    assert sorted(texts.tolist()) == list(range(len(pairs)))
    found = np.stack([np.bincount(rows, sizes[texts]) for sizes in (lengths, targets)], 1).astype(int)
    assert (found <= [12, 7]).all()
    # As many rows as pair by pair, but for ties: which of two rows with as much room in sum comes first is not the rule's.
    assert abs(len(found) - len(fit_of_pairs(pairs, (12, 7)))) <= 1
    assert (found >= 1).all()


def test_places_of_pairs_are_told_on_both_sides() -> None:
    fields = {**text_fields(0), "target": Field(("batch", "target")), "row": Field(("batch",))}
    columns = {"tokens": np.arange(10, 15), "target": np.arange(20, 27), "row": np.array([7, 8, 9])}
    offsets = {"length": offsets_of(np.array([2, 1, 2])), "target": offsets_of(np.array([1, 3, 3]))}
    packed = pack(Split("train", fields, columns, offsets), 4, 6)
    assert [packed.texts[a:b].tolist() for a, b in zip(packed.first, packed.first[1:], strict=False)] == [[1, 0], [2]]
    row = {name: value.tolist() for name, value in packed[0].items()}
    assert row == {
        "tokens": [12, 10, 11],
        "segments": [1, 2, 2],
        "positions": [0, 0, 1],
        "target": [21, 22, 23, 20],
        "target_segments": [1, 1, 1, 2],
        "target_positions": [0, 1, 2, 0],
        "starts": [0, 1],
        "row": [8, 7],
    }
    assert packed.sizes("target").tolist() == [4, 3]
