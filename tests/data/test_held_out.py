"""Rows that are held out: the share of each label, whole groups, the same ones whatever else there is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.held_out import hold_out
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError

EVAL, TEST = "data.eval_fraction", "data.test_fraction"
_shares = st.sampled_from([{EVAL: 0.1}, {EVAL: 0.3}, {TEST: 0.5}, {EVAL: 0.2, TEST: 0.1}, {EVAL: 0.4, TEST: 0.4}])
_seeds = st.integers(0, 2**31)


def labelled(*labels: Any) -> list[Row]:
    return [Row(("a", label), f"f.csv:{i + 2}") for i, label in enumerate(labels)]


def grouped(pairs: list[tuple[str, str]]) -> list[Row]:
    return [Row(("a", label), f"f.csv:{i + 2}", group) for i, (label, group) in enumerate(pairs)]


def test_labels_keep_their_shares() -> None:
    rows = labelled(*(["x"] * 100 + ["y"] * 40 + ["z"] * 5 + ["one"]))
    kept, held, said = hold_out(rows, {EVAL: 0.2, TEST: 0.1}, 3)
    assert Counter(row.values[1] for row in held[EVAL]) == {"x": 20, "y": 8, "z": 1}
    assert Counter(row.values[1] for row in held[TEST]) == {"x": 10, "y": 4}
    assert said == "held out at random: 0.2 for eval, 0.1 for test of each label"
    # A test takes nothing of what is held out without one.
    assert hold_out(rows, {EVAL: 0.2}, 3)[1][EVAL] == held[EVAL]
    assert hold_out(rows, {EVAL: 0.2, TEST: 0.1}, 3)[:2] == (kept, held)
    assert hold_out(rows, {EVAL: 0.2, TEST: 0.1}, 4)[:2] != (kept, held)
    assert hold_out(rows, {EVAL: 0.2}, 3, None)[2] == "held out at random: 0.2 for eval"


@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=6), shares=_shares, seed=_seeds)
@settings(deadline=None, max_examples=150)
def test_each_label_is_within_one_row_of_its_share(counts: list[int], shares: dict[str, float], seed: int) -> None:
    rows = labelled(*(str(label) for label, count in enumerate(counts) for _ in range(count)))
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    if not all(any(round(share * count) and count > 3 for count in counts) for share in shares.values()):
        return  # of so few rows, a share may be none
    kept, held, _ = hold_out(rows, shares, seed)
    parts = [kept, *held.values()]
    assert sorted(row.where for part in parts for row in part) == sorted(row.where for row in rows)
    places = {row.where: i for i, row in enumerate(rows)}
    for part in parts:  # in the order of the file
        assert [places[row.where] for row in part] == sorted(places[row.where] for row in part)
    assert {row.values[1] for row in kept} == {row.values[1] for row in rows}
    for key, share in shares.items():
        found = Counter(row.values[1] for row in held[key])
        for label, count in enumerate(counts):
            assert abs(found[str(label)] - share * count) <= 1
    assert hold_out(rows, shares, seed)[:2] == (kept, held)


_pairs = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([str(i) for i in range(12)])), min_size=1, max_size=80
)


@given(pairs=_pairs, shares=_shares, seed=_seeds)
@settings(deadline=None, max_examples=200)
def test_no_group_is_on_two_sides(pairs: list[tuple[str, str]], shares: dict[str, float], seed: int) -> None:
    rows = grouped(pairs)
    groups = Counter(group for _, group in pairs)
    if len(groups) <= len(shares):
        with pytest.raises(UserError, match="holds out no row"):
            hold_out(rows, shares, seed, grouped=True)
        return
    kept, held, _ = hold_out(rows, shares, seed, grouped=True)
    sides = [{row.group for row in part} for part in (kept, *held.values())]
    assert all(sides)
    assert sum(map(len, sides)) == len(groups)
    assert len(kept) + sum(map(len, held.values())) == len(rows)
    # A pure function of what rows say: their order, and that of their labels, does not matter.
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    _, mixed, _ = hold_out([rows[i] for i in order], shares, seed, grouped=True)
    assert [{row.group for row in part} for part in mixed.values()] == sides[1:]


@given(sizes=st.lists(st.integers(1, 30), min_size=3, max_size=40), shares=_shares, seed=_seeds)
@settings(deadline=None, max_examples=150)
def test_groups_come_close_to_the_share(sizes: list[int], shares: dict[str, float], seed: int) -> None:
    rows = grouped([("x", str(group)) for group, size in enumerate(sizes) for _ in range(size)])
    _, held, _ = hold_out(rows, shares, seed, None, grouped=True)
    for key, share in shares.items():
        assert abs(len(held[key]) - share * len(rows)) <= len(shares) * max(sizes)


@given(counts=st.lists(st.integers(8, 60), min_size=1, max_size=5), seed=_seeds)
@settings(deadline=None, max_examples=40)
def test_groups_of_one_row_keep_the_shares_of_labels(counts: list[int], seed: int) -> None:
    pairs = [str(label) for label, count in enumerate(counts) for _ in range(count)]
    rows = grouped([(label, str(i)) for i, label in enumerate(pairs)])
    _, held, said = hold_out(rows, {EVAL: 0.2, TEST: 0.1}, seed, grouped=True)
    for key, share in ((EVAL, 0.2), (TEST, 0.1)):
        found = Counter(row.values[1] for row in held[key])
        assert all(abs(found[str(label)] - share * count) <= 1 for label, count in enumerate(counts))
    assert said.startswith(f"held out by whole groups: eval {len(held[EVAL])} of {len(rows)} groups, ")


def test_a_row_of_each_label_is_kept() -> None:
    kept, _, _ = hold_out(labelled("x", "x", "y"), {EVAL: 0.9}, 0)
    assert {row.values[1] for row in kept} == {"x", "y"}
    for shares, said in (
        ({EVAL: 0.1}, r"data\.eval_fraction=0\.1 holds out no row of 3; set data\.eval"),
        ({EVAL: 0.5, TEST: 0.1}, r"data\.test_fraction=0\.1 holds out no row of 3; set data\.test"),
    ):
        with pytest.raises(UserError, match=said):
            hold_out(labelled("x", "x", "y"), shares, 0)


def test_a_group_larger_than_the_share_is_held_out_and_said() -> None:
    rows = grouped([("x", "one")] * 6 + [("y", "two")] * 4)
    kept, held, said = hold_out(rows, {EVAL: 0.1}, 0, None, grouped=True)
    assert ({row.group for row in held[EVAL]}, len(kept)) == ({"two"}, 6)
    assert said == "held out by whole groups: eval 1 of 2 groups, 40.0% of the rows"
