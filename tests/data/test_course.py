"""Stages of runs on corpora: rows that become longer and batches that become larger read what a run without stages reads, in its order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.config import load_config
from jaxft.data.batch import HostBatch, text_fields
from jaxft.data.corpus.batches import Stream, StreamBatches
from jaxft.data.corpus.course import Course, Stage, course_of
from jaxft.data.corpus.mixture import Mixture, make_mixture
from jaxft.data.corpus.reading import BestFit, Concatenated
from jaxft.data.corpus.store import Shard, corpus_of
from jaxft.data.packing import packed_fields
from jaxft.errors import UserError
from jaxft.parallel.sharding import make_abstract_mesh, make_rules
from jaxft.training.batch_shapes import check_batch_shapes

LENGTH, BLOCKS = 32, 4
COURSE = Course(LENGTH, (Stage(0, 2, 8), Stage(5, 4, 8), Stage(9, 4, 2), Stage(14, 4, 1)))


def stream(
    kind: type[Concatenated] | type[BestFit] = Concatenated, sources: int = 1, mixture: Mixture | None = None
) -> Stream:
    """Corpora in memory whose tokens are all different."""
    rows: list[Concatenated | BestFit] = []
    for source in range(sources):
        sizes = np.random.default_rng(source).geometric(0.05, 300)
        first = 1 + 100_000 * source
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        shard = Shard(np.arange(first, first + sizes.sum(), dtype=np.uint32), ends)
        lengths = np.stack(np.unique(sizes, return_counts=True), axis=1).astype(np.int64)
        rows.append(kind(corpus_of("made", [shard], lengths, "made", {}), LENGTH))
    fields = packed_fields(text_fields(0))
    return Stream("train", fields, tuple(rows), mixture or Mixture(), tuple(map(str, range(sources))))


def staged(rows: Stream, **more: Any) -> StreamBatches:
    return StreamBatches(rows, BLOCKS, (LENGTH,), 7, course=COURSE, **more)


def tokens_of(batches: list[HostBatch]) -> np.ndarray:
    """The tokens that some batches hold, in their order."""
    return np.concatenate([batch["tokens"][batch["mask"] != 0] for batch in batches])


@pytest.mark.parametrize("kind", [Concatenated, BestFit])
def test_stages_read_the_tokens_of_a_run_without_stages_in_the_same_order(kind: Any) -> None:
    rows = stream(kind)
    batches, plain = staged(rows), StreamBatches(rows, 1, (LENGTH,), 7)
    blocks = COURSE.blocks_before(400)
    assert blocks > 2 * len(rows)  # several epochs, with their short last rows
    found, wanted = (
        tokens_of([some[step] for step in range(count)]) for some, count in ((batches, 400), (plain, blocks))
    )
    assert np.array_equal(found, wanted)


def test_each_stage_has_its_shape_and_as_many_tokens() -> None:
    batches = staged(stream())
    for step, (rows, length) in {
        0: (16, 4),
        4: (16, 4),
        5: (32, 4),
        9: (8, 16),
        13: (8, 16),
        14: (4, 32),
        99: (4, 32),
    }.items():
        batch, shape = batches[step], batches.shape_of(step)
        assert batch["tokens"].shape == (rows, length) == (shape.rows, dict(shape.sizes)["length"])
        assert len(batches.rows_of(step)) == rows
        # What stands in a row begins at place 0, and segments are stretches of one document.
        assert not batch["positions"][:, 0].any()
        same = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["mask"][:, 1:] != 0)
        assert (np.diff(batch["tokens"], axis=1)[same] == 1).all()
        assert (np.diff(batch["positions"], axis=1)[same] == 1).all()
    assert [str(shape) for shape in batches.shapes()] == ["16x4", "32x4", "8x16", "4x32"]
    assert [str(shape) for shape in batches.upcoming(10)] == ["8x16", "4x32", "16x4", "32x4"]
    assert COURSE.text() == "from step 0 16x4, from step 5 32x4, from step 9 8x16, from step 14 4x32"


def test_rows_without_tokens_weigh_nothing() -> None:
    short = replace(staged(stream()), course=Course(LENGTH, (Stage(0, BLOCKS, 8),)))
    weights = [short[step] for step in range(100)]  # two epochs, whose last blocks are not full
    assert any((batch["weights"] == 0).any() for batch in weights)
    for batch in weights:
        assert np.array_equal(batch["weights"] > 0, batch["mask"].any(1))


def test_any_number_of_hosts_reads_the_same_batches_from_any_step() -> None:
    rows = stream()
    whole = staged(rows)
    for step in (0, 6, 9, 13, 14, 123_456):
        for hosts in (2, 4):
            each = BLOCKS // hosts
            parts = [staged(rows, part=(i * each, (i + 1) * each))[step] for i in range(hosts)]
            for name, value in whole[step].items():
                assert np.array_equal(np.concatenate([part[name] for part in parts]), value)


def test_batches_that_are_left_out_are_read_by_nobody() -> None:
    rows = stream()
    batches, later = staged(rows), replace(staged(rows), left_out=((4, 3),))
    assert np.array_equal(
        tokens_of([later[step] for step in range(4)]), tokens_of([batches[step] for step in range(4)])
    )
    after = tokens_of([later[step] for step in range(4, 30)])
    wanted = tokens_of([batches[step] for step in range(7, 40)])
    assert np.array_equal(after, wanted[: len(after)])
    assert later.shape_of(4) == batches.shape_of(4)


_ramps = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), max_size=4)


@given(lengths=st.lists(st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 4, 8])), max_size=4), ramp=_ramps)
@settings(deadline=None, max_examples=60)
def test_what_was_read_before_a_step_is_what_the_steps_before_read(
    lengths: list[tuple[int, int]], ramp: list[tuple[int, int]]
) -> None:
    by_step = {0: 4} | {step: LENGTH // parts for step, parts in lengths} | {40: LENGTH}
    sizes = {0: 1} | dict(ramp) | {41: BLOCKS}
    course = course_of(load_config(None, [
        f"data.max_length={LENGTH}", f"train.batch_size={BLOCKS}", f"data.lengths={by_step}", f"train.batch_ramp={sizes}",
    ]))  # fmt: skip
    read = 0
    for step in range(60):
        assert course.blocks_before(step) == read
        stage, shape = course.at(step), course.shape(course.at(step))
        assert stage.blocks == sizes[max(first for first in sizes if first <= step)]
        assert dict(shape.sizes)["length"] == by_step[max(first for first in by_step if first <= step)]
        assert shape.tokens == stage.blocks * LENGTH
        read += stage.blocks


def test_a_mixtures_stages_begin_at_their_steps() -> None:
    mixture = make_mixture({"0": (1, 0), "7": (0, 1)}, 2, COURSE, "data.mixture")
    batches = staged(stream(sources=2, mixture=mixture))
    before, after = (tokens_of([batches[step] for step in steps]) for steps in (range(7), range(7, 12)))
    assert before.max() < 100_000 < after.min()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.lengths={0: 5, 9: 32}"], "data.lengths.0=5: does not divide data.max_length=32, whose rows are read in whole parts"),
        (["data.lengths={0: 8, 9: 16}"], "data.lengths: its last stage has 16, and data.max_length=32; make them equal"),
        (["data.lengths={3: 32}"], "data.lengths: no stage begins at step 0; for instance {0: 8, 1000: 32}"),
        (["data.lengths={x: 32}"], "data.lengths.x: must be the first step of a stage, 0 or more"),
        (["data.lengths={0: -8, 4: 32}"], "data.lengths.0=-8: must be at least 1"),
        (["train.batch_ramp={0: 1, 9: 2}"], "train.batch_ramp: its last stage has 2, and train.batch_size=4; make them equal"),
        (["train.batch_ramp={0: 0, 9: 4}"], "train.batch_ramp.0=0: must be at least 1"),
        (["train.batch_ramp={0: 2000000, 9: 4}"], "train.batch_ramp.0=2000000: must be at most 1048576"),
        (["train.batch_ramp={}"], "train.batch_ramp={}: names no stage"),
        (["data.lengths={}"], "data.lengths={}: names no stage"),
    ],
)  # fmt: skip
def test_stages_that_make_no_sense_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        course_of(load_config(None, [f"data.max_length={LENGTH}", f"train.batch_size={BLOCKS}", *overrides]))
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.batch_ramp={0: 3, 5: 4}", "train.accumulation=2"],
            "train.batch_ramp: the 3 rows of step 0 are no multiple of train.accumulation=2",
        ),
        (
            ["train.batch_ramp={0: 2, 5: 3, 7: 4}", "mesh.data=2"],
            "train.batch_ramp: rows of step 5 / train.accumulation = 3 cannot be split 2 ways (mesh slices x data x fsdp); choose a "
            "multiple of 2",
        ),
        (
            ["data.lengths={0: 2, 5: 32}", "mesh.context=4", "mesh.data=1"],
            "data.lengths: rows of 2 tokens cannot be split 4 ways (mesh context); choose a multiple",
        ),
    ],
)
def test_stages_that_no_mesh_could_split_are_refused(overrides: list[str], said: str) -> None:
    config = load_config(None, [
        "task.name=masked_lm", "data.packing=concatenated", f"data.max_length={LENGTH}", f"train.batch_size={BLOCKS}", *overrides
    ])  # fmt: skip
    mesh = make_abstract_mesh(config.mesh, 4 if config.mesh.context > 1 else 2)
    with pytest.raises(UserError) as error:
        check_batch_shapes(config, mesh, make_rules(config.mesh))
    assert str(error.value) == said
