"""Corpora: the same bytes however they are built, every token read once an epoch, an order that no host changes, clear refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.batch import text_fields
from jaxft.data.corpus import build as build_module
from jaxft.data.corpus.batches import Stream, StreamBatches
from jaxft.data.corpus.build import build
from jaxft.data.corpus.course import Course, Stage
from jaxft.data.corpus.files import Shard, seal_file
from jaxft.data.corpus.mixture import Mixture, make_mixture
from jaxft.data.corpus.options import Options
from jaxft.data.corpus.order import permuted
from jaxft.data.corpus.plan import Plan, make_plan
from jaxft.data.corpus.reading import BestFit, Concatenated, Rows
from jaxft.data.corpus.share import Share, share_of
from jaxft.data.corpus.store import Corpus, corpus_of, open_corpus
from jaxft.data.packing import packed_fields
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tiny.write_tokenizer(folder / "tokenizer")
    rows = [text for text, _ in tiny.rows(300)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (folder / "b.txt").write_text("\n".join(rows[:120]) + "\n\n")
    return folder


def plan_of(
    home: Path, out: Path, sources: Sequence[str] = ("a.jsonl", "b.txt"), **options: Any
) -> tuple[Plan, Tokenizer]:
    tokenizer = Tokenizer(home / "tokenizer")
    made = dataclasses.replace(Options(part_bytes=4000), **options)
    return make_plan(out, [str(home / source) for source in sources], tokenizer, made), tokenizer


def built(home: Path, out: Path, *shares: Share, workers: int = 1, **options: Any) -> dict[str, str]:
    """The hash of every file."""
    plan, tokenizer = plan_of(home, out, **options)
    for share in shares or (Share(0, 1),):
        build(plan, tokenizer, share, workers, lambda text: None)
    found = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_shares_and_builds_that_were_killed_leave_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"eval_fraction": 0.2, "duplicates": "exact"}
    whole = built(home, tmp_path / "whole", **options)
    assert sum(name.startswith("train/tokens") for name in whole) > 4
    assert built(home, tmp_path / "shares", Share(2, 3), Share(0, 3), Share(1, 3), **options) == whole
    killed, real = 0, build_module.write_sealed

    def dies(path: Path, body: Any) -> None:
        nonlocal killed
        if path.name == seal_file(killed):
            killed += 1
            raise KeyboardInterrupt
        real(path, body)

    monkeypatch.setattr(build_module, "write_sealed", dies)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            built(home, tmp_path / "killed", **options)
    monkeypatch.setattr(build_module, "write_sealed", real)
    assert killed == 3
    assert built(home, tmp_path / "killed", **options) == whole
    # Copies are on no two sides: of 300 texts, the 120 that are there again are left out.
    train, held = (open_corpus(tmp_path / "whole" / split) for split in ("train", "eval"))
    seen = [corpus.document(i).tobytes() for corpus in (train, held) for i in range(corpus.documents)]
    assert len(seen) == len(set(seen))


@pytest.mark.slow
def test_worker_processes_leave_the_same_bytes(home: Path, tmp_path: Path) -> None:
    assert built(home, tmp_path / "two", workers=2) == built(home, tmp_path / "one")


def test_documents_are_those_of_the_tokenizer(home: Path, tmp_path: Path) -> None:
    built(home, tmp_path / "out")
    corpus, tokenizer = open_corpus(tmp_path / "out"), Tokenizer(home / "tokenizer")
    lines = [json.loads(line)["text"] for line in (home / "a.jsonl").read_text().splitlines()]
    texts = [*lines, *(home / "b.txt").read_text().splitlines()[:120]]
    assert corpus.documents == len(texts)
    for number, ids in enumerate(tokenizer.ids(texts)):
        assert corpus.document(number).tolist() == ids


@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**40), st.integers(0, 9)))
def test_orders_are_bijections(size: int, key: tuple[int, int]) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


def made(sizes: Sequence[int], shards: int = 3) -> Corpus:
    """A corpus in memory whose tokens are all different."""
    lengths, first, found = np.array(sizes), 1, []
    for part in np.array_split(lengths, shards):
        found.append(
            Shard(
                np.arange(first, first + part.sum(), dtype=np.uint32),
                np.concatenate([[0], np.cumsum(part)]).astype(np.int64),
            )
        )
        first += int(part.sum())
    counts = np.stack(np.unique(lengths, return_counts=True), axis=1)
    return corpus_of("made", found, counts.astype(np.int64), "made", {})


def stream_of(*rows: Rows, mixture: Mixture | None = None) -> Stream:
    digests = tuple(map(str, range(len(rows))))
    return Stream("train", packed_fields(text_fields(0)), rows, mixture or Mixture(), digests)


@pytest.mark.parametrize("kind", [Concatenated, BestFit])
@pytest.mark.parametrize("seed", [None, 7])
def test_each_token_is_read_once_an_epoch(kind: type[Concatenated] | type[BestFit], seed: int | None) -> None:
    rng = np.random.default_rng(0)
    corpus = made(rng.geometric(0.05, 9000).tolist())
    rows = kind(corpus, 16)
    assert kind is Concatenated or rows.count > 2 * 4096  # several groups
    stream, seen = stream_of(rows), []
    for first in range(rows.count, 2 * rows.count, 512):  # the second epoch
        batch = stream.batch(np.arange(first, min(first + 512, 2 * rows.count)), seed)
        seen.append(batch["tokens"][batch["mask"] != 0])
        same = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["mask"][:, 1:] != 0)
        assert (np.diff(batch["tokens"], axis=1)[same] == 1).all()  # a segment is a stretch of one document
        assert (np.diff(batch["positions"], axis=1)[same] == 1).all()
        assert not (batch["positions"][:, 1:][~same]).any()
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(1, corpus.tokens + 1))
    density = corpus.tokens / (rows.count * 16)
    assert density > (0.97 if kind is BestFit else 0.999)


def test_short_documents_stay_whole_where_there_is_one_group() -> None:
    sizes = np.random.default_rng(1).integers(2, 17, 2000)
    rows = BestFit(made(sizes.tolist()), 16)
    batch = stream_of(rows).batch(np.arange(rows.count), 3)
    kept = batch["mask"] != 0
    begins = int(((batch["positions"] == 0) & kept).sum())
    assert begins == len(sizes)


@pytest.mark.parametrize("kind", [Concatenated, BestFit])
def test_any_number_of_hosts_reads_the_same_batches_from_any_step(kind: type[Concatenated] | type[BestFit]) -> None:
    stream = stream_of(kind(made(np.random.default_rng(2).geometric(0.05, 3000).tolist()), 16))
    whole = StreamBatches(stream, 64, (16,), 5)
    for step in np.random.default_rng(3).integers(0, 10_000, 10).tolist():
        wanted = whole[step]["tokens"]
        for hosts in (1, 2, 4, 8, 64):
            each = 64 // hosts
            parts = [
                StreamBatches(stream, 64, (16,), 5, (i * each, (i + 1) * each))[step]["tokens"] for i in range(hosts)
            ]
            assert np.array_equal(np.concatenate(parts), wanted)


def test_mixtures_keep_exact_shares_through_stages() -> None:
    course = Course(16, (Stage(0, 8, 1),))
    mixture = make_mixture({"0": (0.7, 0.2, 0.1), "10": (0, 1, 1)}, 3, course, "data.mixture")
    assert mixture.stages[0].shares == (Fraction(7, 10), Fraction(1, 5), Fraction(1, 10))
    chosen, rows = mixture.rows_of(np.arange(400), [50, 60, 70])
    for count in range(1, 401):
        assert np.bincount(chosen[:count], minlength=3).tolist() == mixture.taken(count)
    assert np.abs(np.bincount(chosen[:80], minlength=3) - np.array([56, 16, 8])).max() == 0
    for source in range(3):  # each reads its own rows, one after the other
        assert rows[chosen == source].tolist() == list(range((chosen == source).sum()))
    # Any batch alone gives what all of them together give.
    assert np.array_equal(mixture.rows_of(np.arange(96, 104), [50, 60, 70])[1], rows[96:104])


def test_shares_of_launchers() -> None:
    assert share_of("1/4", {"SLURM_ARRAY_TASK_ID": "9"}) == (1, 4)
    slurm = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}
    assert share_of(None, slurm) == (2, 3)
    assert share_of(None, {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "4"}) == (2, 4)
    assert share_of(None, {}) == (0, 1)
    for said, environ in (("4/4", {}), ("a", {}), (None, {"JOB_COMPLETION_INDEX": "2"})):
        with pytest.raises(UserError, match="--part"):
            share_of(said, environ)


def test_what_cannot_be_built_is_refused_in_one_line(home: Path, tmp_path: Path, capsys: Capture) -> None:
    bad, out = tmp_path / "bad.txt", tmp_path / "out"
    bad.write_bytes(b"the cat\nthe \xff dog\n")
    command = ("data", "build", bad, "--tokenizer", home / "tokenizer", "--workers", "1", "--out", out)
    assert (
        tiny.run(capsys, *command)[2]
        .splitlines()[-1]
        .endswith(
            "bad.txt byte 12: not valid UTF-8 (invalid start byte); correct it, or choose --invalid-utf8 replace or skip"
        )
    )
    error = tiny.run(capsys, *command, "--invalid-utf8", "skip")[2]
    assert "invalid_utf8='refuse', here it is 'skip'" in error
    code, said, _ = tiny.run(capsys, *command[:-1], tmp_path / "skipped", "--invalid-utf8", "skip")
    assert code == 0
    assert "1 lines that are not valid UTF-8, left out; the first: " in said
    bad.write_bytes(bad.read_bytes() + b"more\n")
    again = tiny.refusal(capsys, *command[:-1], tmp_path / "skipped", "--invalid-utf8", "skip")
    assert "is stale: " in again
    shard = tmp_path / "skipped" / "tokens-00000.bin"
    code, said, _ = tiny.run(capsys, "data", "show", tmp_path / "skipped")
    assert "[CLS] the cat [SEP]" in said
    raw = bytearray(shard.read_bytes())
    raw[2] ^= 1
    shard.write_bytes(raw)
    assert tiny.run(capsys, "data", "verify", tmp_path / "skipped")[0] == 1
    shard.write_bytes(raw[:3])
    assert "too short: it was cut off" in tiny.refusal(capsys, "data", "show", tmp_path / "skipped")
    assert "--out FOLDER is missing" in tiny.refusal(capsys, "data", "build", bad, "--tokenizer", home / "tokenizer")
    assert "--part: is for jaxft data build" in tiny.refusal(capsys, "data", "show", tmp_path, "--part", "0/1")


def corpora(home: Path, out: Path) -> tuple[str, ...]:
    """Settings of a run on a corpus and one that is held out."""
    built(home, out, eval_fraction=0.1)
    return (
        "task.name=masked_lm", f"model.init={tiny.make_folder(out / 'model', 'masked_lm')}", f"data.train={out / 'train'}",
        f"data.eval={out / 'eval'}", "data.max_length=16", "train.batch_size=8", "train.steps=4",
    )  # fmt: skip


def test_a_run_refuses_what_it_cannot_read_of_corpora(home: Path, tmp_path: Path, capsys: Capture) -> None:
    settings = corpora(home, tmp_path / "c")
    train, held = tmp_path / "c" / "train", tmp_path / "c" / "eval"
    for more, message in (
        (("data.packing=none",), "choose concatenated"),
        (
            ("data.packing=concatenated", "data.lengths={0: 8, 2: 16}", "train.steps=null"),
            "data.lengths: stages begin at steps",
        ),
        (("data.packing=best_fit", "data.eval=null"), "data.eval: nothing can be held out"),
        (("data.packing=best_fit", f"data.train={tmp_path / 'c'}"), "holds corpora; name one"),
        (("data.packing=concatenated", f"data.train={home / 'a.jsonl'}"), "is for corpora"),
        (("data.packing=best_fit", "task.name=classification"), "needs more; name rows"),
        (("data.packing=best_fit", f"data.train=[{train}, {home / 'a.jsonl'}]"), "other sources are not"),
        (("data.packing=best_fit", f"data.train=[{train}, {held}]", "data.mixture={0: [1]}"), "1 weights for the 2"),
        (
            (
                "data.packing=best_fit",
                f"data.train=[{train}, {held}]",
                "data.mixture={0: [1, 1]}",
                "data.repeats=0.001",
            ),
            "would be read",
        ),
    ):
        capsys.readouterr()
        code, _, err = tiny.run(capsys, "data", *settings, *more)
        assert code == 2, more
        assert message in err.splitlines()[-1], more
    code, said, _ = tiny.run(capsys, "data", *settings, "data.packing=concatenated", "--rows", "1")
    assert code == 0
    assert "training row 0, " in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "stages"),
    [
        ("concatenated", ()),
        ("best_fit", ()),
        ("concatenated", ("data.lengths={0: 4, 1: 8, 3: 16}", "train.batch_ramp={0: 4, 2: 8}")),
    ],
)
def test_a_run_that_was_stopped_reads_on(
    home: Path, tmp_path: Path, capsys: Capture, packing: str, stages: tuple[str, ...]
) -> None:
    more = (
        "train.log_every=1",
        "eval.every=2",
        "train.export=false",
        "optim.schedule=constant",
        "optim.warmup_steps=1",
    )
    settings = ("train", *corpora(home, tmp_path / "c"), f"data.packing={packing}", *more, *stages)
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert tiny.run(capsys, *settings, f"train.out={tmp_path / out}", f"train.steps={steps}")[0] == 0
    whole, parts = ((tmp_path / out / "log.jsonl").read_text() for out in ("whole", "parts"))
    assert whole == parts


def test_near_copies_are_left_out(home: Path, tmp_path: Path) -> None:
    words = [f"w{number}" for number in np.random.default_rng(4).integers(0, 10_000, 300)]
    others = [f"v{number}" for number in np.random.default_rng(5).integers(0, 10_000, 300)]
    texts = [" ".join(words), " ".join(others), " ".join([*words[:150], "changed", *words[151:]]), " ".join(words)]
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    for duplicates, left in (("keep", 4), ("exact", 3), ("near", 2)):
        plan, tokenizer = plan_of(home, tmp_path / duplicates, [str(tmp_path / "texts.txt")], duplicates=duplicates)
        assert build(plan, tokenizer, Share(0, 1), 1, lambda text: None)
        assert open_corpus(tmp_path / duplicates).documents == left
