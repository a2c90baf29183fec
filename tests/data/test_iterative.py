"""Rows of several labels that are held out: each label's share, rare labels, rows without any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.config import run_config
from jaxft.config.stored import as_today
from jaxft.data.held_out import hold_out
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError

EVAL, TEST = "data.eval_fraction", "data.test_fraction"
_shares = st.sampled_from([{EVAL: 0.1}, {EVAL: 0.3}, {TEST: 0.5}, {EVAL: 0.2, TEST: 0.1}, {EVAL: 0.4, TEST: 0.4}])
_seeds = st.integers(0, 2**31)


def labels_of(row: Row) -> list[object]:
    assert isinstance(row.values[1], list)
    return list(row.values[1])


def rows_with(sets: Sequence[Sequence[str]], groups: Sequence[str] | None = None) -> list[Row]:
    return [
        Row(("a", list(labels)), f"f.jsonl:{i + 1}", "" if groups is None else groups[i])
        for i, labels in enumerate(sets)
    ]


def drawn(count: int, labels: int, mean: float, seed: int) -> list[list[str]]:
    """Sets of labels of which few are frequent and many are rare."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, labels + 1)
    found = rng.random((count, labels)) < np.minimum(chance / chance.sum() * mean, 0.9)
    return [[f"l{i}" for i in np.flatnonzero(row)] for row in found]


def counts(rows: Sequence[Row]) -> Counter[str]:
    return Counter(str(label) for row in rows for label in labels_of(row))


def parted(rows: list[Row], shares: dict[str, float], seed: int) -> tuple[list[Row], dict[str, list[Row]]] | None:
    """The rows that are kept and those held out; None: a part would be empty, which is refused."""
    try:
        return hold_out(rows, shares, seed, labels_of)[:2]
    except UserError as error:
        if "holds out no row of" not in str(error):
            raise
        return None


def farthest(part: Sequence[Row], rows: Sequence[Row], share: float) -> float:
    """By how many rows the label that is farthest from its share misses it; all rows count as one label."""
    found, there = counts(part), counts(rows)
    return max(abs(len(part) - share * len(rows)), *(abs(found[label] - share * n) for label, n in there.items()))


@pytest.mark.parametrize("shares", [{EVAL: 0.1}, {EVAL: 0.1, TEST: 0.05}])
def test_each_label_is_within_a_row_of_its_share(shares: dict[str, float]) -> None:
    rows = rows_with(drawn(2000, 50, 3.0, 0))
    kept, held, said = hold_out(rows, shares, 0, labels_of)
    worst = max(farthest(held[key], rows, share) for key, share in shares.items())
    assert worst <= 1
    listed = ", ".join(f"{share:g} for {key.split('.')[1].split('_')[0]}" for key, share in shares.items())
    assert said == f"held out by labels: {listed} of each of 50 labels, to {worst:.1f} rows"
    # At random it is many times as far.
    _, mixed, _ = hold_out(rows, shares, 0, None)
    assert max(farthest(mixed[key], rows, share) for key, share in shares.items()) > 4 * worst
    # Whoever asks for a test as well finds the same rows held out for evaluation.
    assert hold_out(rows, {EVAL: 0.1}, 0, labels_of)[1][EVAL] == held[EVAL]
    assert hold_out(rows, shares, 1, labels_of)[:2] != (kept, held)


_sets = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=5), min_size=1, max_size=80)


@given(sets=_sets, shares=_shares, seed=_seeds)
@settings(deadline=None, max_examples=150)
def test_what_holds_of_any_rows(sets: list[list[str]], shares: dict[str, float], seed: int) -> None:
    rows = rows_with(sets)
    found = parted(rows, shares, seed)
    if found is None:
        assert len(rows) < 12 or len(counts(rows)) > 4
        return
    kept, held = found
    parts = [kept, *held.values()]
    places = {row.where: i for i, row in enumerate(rows)}
    order = [[places[row.where] for row in part] for part in parts]
    assert sorted(place for part in order for place in part) == list(range(len(rows)))
    assert all(part == sorted(part) for part in order)
    assert set(counts(kept)) == set(counts(rows))
    assert kept
    assert hold_out(rows, shares, seed, labels_of)[:2] == (kept, held)


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5), shares=_shares, seed=_seeds)
@settings(deadline=None, max_examples=100)
def test_one_label_a_row_is_within_a_row_of_its_share(sizes: list[int], shares: dict[str, float], seed: int) -> None:
    rows = rows_with([[f"l{i}"] for i, size in enumerate(sizes) for _ in range(size)])
    found = parted(rows, shares, seed)
    if found is None:
        assert sum(sizes) <= 12
        return
    kept, held = found
    for key, share in shares.items():
        for label, count in counts(rows).items():
            assert abs(counts(held[key])[label] - share * count) <= 1
    assert set(counts(kept)) == set(counts(rows))


def test_labels_of_one_or_two_rows_and_rows_without_labels() -> None:
    sets = [["rare"], ["two", "x"], ["two", "y"], *([["x"]] * 40), *([["x", "y"]] * 20), *([[]] * 40)]
    for seed in range(5):
        rows = rows_with(sets)
        kept, held, _ = hold_out(rows, {EVAL: 0.5}, seed, labels_of)
        assert counts(kept)["rare"] == 1
        assert counts(kept)["two"] == counts(held[EVAL])["two"] == 1
        assert abs(sum(not labels_of(row) for row in held[EVAL]) - 20) <= 1
        assert farthest(held[EVAL], rows, 0.5) <= 1


def test_the_last_row_of_a_label_is_kept_whatever_it_has_besides() -> None:
    rows = rows_with([["a", "b"], ["a"], ["a"], ["b"], ["b"], ["c", "a"], ["d", "b"]])
    for seed in range(20):
        kept, held, _ = hold_out(rows, {EVAL: 0.6, TEST: 0.2}, seed, labels_of)
        assert set(counts(kept)) == set("abcd")
        assert held[EVAL]
        assert held[TEST]


def test_groups_of_rows_with_several_labels_come_close_to_the_shares() -> None:
    sets = drawn(600, 12, 2.0, 1)
    groups = [f"g{i}" for i in np.random.default_rng(0).integers(150, size=600)]
    rows = rows_with(sets, groups)
    kept, held, said = hold_out(rows, {EVAL: 0.2, TEST: 0.1}, 0, labels_of, grouped=True)
    sides = [{row.group for row in part} for part in (kept, *held.values())]
    assert sum(map(len, sides)) == len(set(groups))
    assert said.startswith(f"held out by whole groups: eval {len(sides[1])} of {len(set(groups))} groups, ")
    assert farthest(held[EVAL], rows, 0.2) <= 4
    _, mixed, _ = hold_out(rows, {EVAL: 0.2, TEST: 0.1}, 0, None, grouped=True)
    assert farthest(mixed[EVAL], rows, 0.2) > 2 * farthest(held[EVAL], rows, 0.2)


@pytest.mark.parametrize(
    ("task", "data", "stratified"),
    [
        ("multi_label", {"eval": None}, False),
        ("multi_label", {"eval": "e.csv", "test_fraction": 0.1}, False),
        ("multi_label", {"eval": "e.csv"}, True),
        ("multi_label", {"eval": None, "stratify": True}, True),
        ("classification", {"eval": None}, True),
    ],
)
def test_runs_of_earlier_versions_keep_their_held_out_rows(
    task: str, data: dict[str, object], stratified: bool
) -> None:
    stored = as_today({"task": {"name": task}, "data": {"train": "t.csv", **data}})
    assert run_config(stored).data.stratify is stratified
