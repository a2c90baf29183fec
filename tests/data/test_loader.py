"""The order of data: every row once per epoch, and each batch a function of (seed, step) alone."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.batch import Field, HostBatch, text_fields, text_shape
from jaxft.data.examples import Split, offsets_of
from jaxft.data.loader import Batches, make_buckets, stream

BUCKETS = (4, 8, 16)


def split_of(lengths: list[int]) -> Split:
    """Row i holds only the token 10 + i, so that a batch tells which rows it has."""
    tokens = np.concatenate([np.full(length, 10 + i, np.int32) for i, length in enumerate(lengths)])
    labels = np.arange(len(lengths), dtype=np.int32) % 5
    fields = {**text_fields(pad_id=7), "labels": Field(("batch",))}
    columns = {"tokens": tokens, "types": tokens % 2, "labels": labels}
    return Split("test", fields, columns, {"length": offsets_of(np.array(lengths))})


def rows_in(batch: HostBatch) -> list[int]:
    """Row numbers of a batch, after checking that each row is whole and the rest is padding."""
    real = batch["weights"] > 0
    assert set(batch["weights"].tolist()) <= {0.0, 1.0}
    assert not batch["mask"][~real].any()
    assert (batch["tokens"][batch["mask"] == 0] == 7).all()
    rows = batch["tokens"][real, 0] - 10
    same = batch["tokens"] == batch["tokens"][:, :1]
    assert (same | (batch["mask"] == 0))[real].all()
    assert (batch["labels"][real] == rows % 5).all()
    assert (batch["types"][real] == (batch["tokens"] % 2 * batch["mask"])[real]).all()
    return rows.tolist()


def same(a: HostBatch, b: HostBatch) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


SPLITS = st.lists(st.integers(1, 16), min_size=1, max_size=130).map(split_of)
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=60)
@given(SPLITS, st.integers(1, 12), SEEDS, st.integers(0, 3))
def test_every_row_exactly_once_per_epoch(split: Split, size: int, seed: int, epoch: int) -> None:
    batches = Batches(split, size, BUCKETS, seed)
    spe = batches.steps_per_epoch
    seen: list[int] = []
    for step in range(epoch * spe, (epoch + 1) * spe):
        batch = batches[step]
        rows = rows_in(batch)
        assert batches.shape_of(step) in batches.shapes()
        assert batch["tokens"].shape == (size, dict(batches.shape_of(step).sizes)["length"])
        # The tightest bucket that holds the longest row.
        longest = split.sizes("length")[rows].max()
        assert batch["tokens"].shape[1] == min(b for b in BUCKETS if b >= longest)
        # Rows without weight fill up the last batch only.
        assert len(rows) == size or step == (epoch + 1) * spe - 1
        seen += rows
    assert sorted(seen) == list(range(len(split)))


@settings(max_examples=30)
@given(SPLITS, st.integers(1, 4), SEEDS, st.integers(0, 300), st.sampled_from([1, 2, 4]))
def test_processes_share_the_batch(split: Split, quarter: int, seed: int, step: int, count: int) -> None:
    size = 4 * quarter
    whole = Batches(split, size, BUCKETS, seed)[step]
    parts = [
        Batches(split, size, BUCKETS, seed, (i * size // count, (i + 1) * size // count))[step] for i in range(count)
    ]
    assert len({part["tokens"].shape for part in parts}) == 1
    assert same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@settings(max_examples=20)
@given(SPLITS, st.integers(1, 8), SEEDS)
def test_content_is_a_function_of_seed_and_step(split: Split, size: int, seed: int) -> None:
    forwards = Batches(split, size, BUCKETS, seed)
    steps = 2 * forwards.steps_per_epoch + 1
    first = [forwards[step] for step in range(steps)]
    backwards = Batches(split, size, BUCKETS, seed)  # a new process, asked in another order
    assert all(same(first[step], backwards[step]) for step in reversed(range(steps)))


def test_stream_from_any_start_equals_random_access() -> None:
    split = split_of([1 + i * 7 % 16 for i in range(61)])
    batches = Batches(split, 4, BUCKETS, 3)
    for start, stop in [(0, 40), (1, 3), (15, 17), (37, 40), (16, 16), (20, 3)]:
        streamed = list(stream(batches, start, stop, 4))
        assert len(streamed) == max(0, stop - start)
        assert all(same(batch, batches[step]) for batch, step in zip(streamed, range(start, stop), strict=False))


def test_a_stream_may_be_left_early() -> None:
    batches = Batches(split_of([3] * 50), 4, BUCKETS, 0)
    for _ in range(3):
        assert len(list(itertools.islice(stream(batches, 0, 10**6, 2), 5))) == 5


def test_far_steps_are_at_hand() -> None:
    batches = Batches(split_of([3] * 50), 4, BUCKETS, 0)
    step = 10**9
    assert same(next(stream(batches, step, step + 1, 1)), batches[step])


def test_epochs_and_seeds_differ() -> None:
    split = split_of([4] * 200)
    orders = {}
    for seed, epoch in itertools.product((0, 1, 2, 2**32 - 1), range(3)):
        batches = Batches(split, 8, BUCKETS, seed)
        spe = batches.steps_per_epoch
        steps = range(epoch * spe, (epoch + 1) * spe)
        orders[seed, epoch] = tuple(i for step in steps for i in rows_in(batches[step]))
    # Not one order among them twice: epoch 1 of seed 0 must not be epoch 0 of seed 1 either.
    assert len(set(orders.values())) == len(orders)


def test_shuffle_reaches_across_the_split() -> None:
    batches = Batches(split_of([4] * 4000), 8, BUCKETS, 0)
    first = [i for step in range(50) for i in batches.rows_of(step)]
    # Of 400 of 4000 shuffled rows, each tenth of the split has about 40 (sd 6).
    counts = np.bincount(np.array(first) // 400, minlength=10)
    assert counts.min() > 15
    assert counts.max() < 65


def test_similar_lengths_share_a_batch() -> None:
    rng = np.random.default_rng(0)
    split = split_of(rng.integers(1, 17, 2000).tolist())
    batches = Batches(split, 8, BUCKETS, 0)
    padded = sum(batches[step]["tokens"].size for step in range(batches.steps_per_epoch))
    assert padded < 1.35 * split.sizes("length").sum()
    # Batches do not come in order of length.
    widths = [batches[step]["tokens"].shape[1] for step in range(50)]
    assert sorted(widths) != widths


def test_evaluation_sees_every_row_once_in_order_of_length() -> None:
    lengths = [1 + i % 16 for i in range(22)]
    batches = Batches(split_of(lengths), 8, BUCKETS, None)
    assert len(batches) == batches.steps_per_epoch == 3
    seen = [i for step in range(3) for i in rows_in(batches[step])]
    assert seen == sorted(range(22), key=lambda i: lengths[i])
    assert batches[2]["weights"].tolist() == [1] * 6 + [0] * 2
    assert len(list(stream(batches, 0, 3, 4))) == 3


def test_buckets() -> None:
    assert make_buckets(None, 128) == (16, 32, 64, 128)
    assert make_buckets(None, 100) == (16, 32, 64, 100)
    assert make_buckets(None, 16) == (16,)
    assert make_buckets(None, 5) == (5,)
    assert make_buckets((64, 8, 8, 32), 60) == (8, 32, 64)
    split = split_of([5, 6, 8])
    assert Batches(split, 2, BUCKETS, 0).shapes() == (text_shape(2, 8),)
