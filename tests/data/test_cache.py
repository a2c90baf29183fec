"""Token caches: what is read is what was written, batches are those of rows in memory, and what is not whole is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft import tasks
from jaxft.config import RunConfig, load_config
from jaxft.data import cache as cache_module
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.cache import Cache, open_cache, write_cache
from jaxft.data.cache_files import MANIFEST, damages, is_cache, write_manifest
from jaxft.data.examples import Encoded, Examples, make_split
from jaxft.data.loader import Batches
from jaxft.data.packing import pack
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.training.batch_shapes import buckets_of
from jaxft.training.caching import build_caches
from jaxft.training.processors import processor_of
from jaxft.training.rows import Rows, open_rows
from jaxft.training.setup import settled

Capture = pytest.CaptureFixture[str]
FIELDS: Fields = {
    **text_fields(7),
    "labels": Field(("batch",)),
    "scores": Field(("batch", 3), "float32"),
    "places": Field(("batch", "target", 2)),
}


def write(folder: Path, encoded: Any, fields: Fields = FIELDS, **made: Any) -> Path:
    write_cache(folder, encoded, fields, made, lambda split: {"rows": len(split)})
    return folder


# ----------------------------------------------------------------------------------------------------------- what is stored


@st.composite
def encodings(draw: st.DrawFn) -> list[Encoded]:
    """Rows of any lengths, none among them too, whose ids need one byte, two or four, sooner or later."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = draw(st.sampled_from([(0, 200), (-1, 100), (0, 60_000), (-300, 300), (0, 2**31 - 1), (-(2**31), 9)]))
    late = draw(st.integers(0, 12))

    def ids(row: int, *shape: int) -> np.ndarray:
        return rng.integers(low if row >= late else 0, high if row >= late else 9, shape, np.int32, endpoint=True)

    return [
        Encoded(
            {
                "tokens": ids(i, tokens),
                "types": np.zeros(tokens, np.int32),
                "labels": ids(i)[()],
                "scores": rng.standard_normal(3).astype(np.float32),
                "places": ids(i, targets, 2),
            },
            i,
            dropped=int(rng.integers(0, 300)),
        )
        for i, (tokens, targets) in enumerate(sizes)
    ]


@settings(max_examples=30)
@given(encoded=encodings(), buffered=st.sampled_from([1, 40, 1 << 18]))
def test_a_cache_is_the_split_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, encoded: list[Encoded], buffered: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "_BUFFERED", buffered)
        folder = write(tmp_path_factory.mktemp("cache") / "rows", iter(encoded))
    found, split = open_cache(folder, "train", FIELDS), make_split("train", encoded, FIELDS)
    assert (len(found), found.rows, found.about) == (len(split), len(split), {"rows": len(split)})
    assert found.digest() == split.digest()
    assert list(found.columns) == list(split.columns)
    for name, values in split.columns.items():
        assert found.columns[name].dtype.itemsize <= values.dtype.itemsize
        assert np.array_equal(found.columns[name], values)
    for axis, ends in split.offsets.items():
        assert np.array_equal(found.offsets[axis], ends)
        assert np.array_equal(found.sizes(axis), split.sizes(axis))
    assert found.dropped is not None
    assert np.array_equal(found.dropped, np.array([one.dropped for one in encoded]))
    for i in range(len(split)):
        assert {name: value.tolist() for name, value in found[i].items()} == {
            name: value.tolist() for name, value in split[i].items()
        }
    assert list(damages(folder)) == []


def texts(count: int = 50, highest: int = 900) -> Iterator[Encoded]:
    for i in range(count):
        tokens = (np.arange(1 + i % 7, dtype=np.int32) * 37 + i) % highest
        yield Encoded({"tokens": tokens, "types": tokens % 2}, i)


def test_ids_are_as_narrow_as_the_vocabulary(tmp_path: Path) -> None:
    for vocabulary, kind in ((256, "u1"), (65536, "u2"), (65537, "i4")):
        folder = tmp_path / kind
        write_cache(folder, texts(), text_fields(0), {}, lambda split: {}, {"tokens": vocabulary - 1})
        columns = open_cache(folder, "train", text_fields(0)).columns
        # 900 ids need two bytes in any case.
        assert columns["tokens"].dtype == max(np.dtype(kind), np.dtype("u2"), key=lambda one: one.itemsize)
        assert columns["types"].dtype == np.dtype("u1")
        assert not columns["tokens"].flags.writeable


# ------------------------------------------------------------------------------------------------------------ broken caches


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_files_that_are_not_as_written_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole", texts(), text_fields(0))
    files = sorted(path.name for path in folder.iterdir())
    assert files == [MANIFEST, "column-tokens.bin", "column-types.bin", "dropped.bin", "offsets-length.bin"]
    for number, name in enumerate(files):
        content = (folder / name).read_bytes()
        content = content.removesuffix(b"\n") if name == MANIFEST else content  # without it, it is whole
        for size in (0, 1, len(content) // 2, len(content) - 1, len(content) + 1):
            other = copied(folder, tmp_path / f"{number}-{size}")
            (other / name).write_bytes((content + b"x")[:size])
            with pytest.raises(UserError) as caught:
                open_cache(other, "train", text_fields(0))
            said = str(caught.value)
            assert said.startswith(f"{other / name}: "), said
            assert said.endswith("remove the folder and build it again (jaxft cache build)")
            assert "\n" not in said
            if name != MANIFEST:
                assert f"({size} bytes, not {len(content)})" in said
                assert ("cut off" in said) == (size < len(content))
        other = copied(folder, tmp_path / f"{number}-gone")
        (other / name).unlink()
        with pytest.raises(
            UserError, match="was not finished" if name == MANIFEST else f"{name}: this file .* is gone"
        ):
            open_cache(other, "train", text_fields(0))
        assert is_cache(other)


def test_a_flipped_byte_is_found_and_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxft.data.cache_files.BLOCK", 64)
    folder = write(tmp_path / "rows", texts(), text_fields(0))
    for name in ("column-tokens.bin", "offsets-length.bin", "dropped.bin"):
        content = bytearray((folder / name).read_bytes())
        for place in (0, len(content) - 1):
            content[place] ^= 4
        (folder / name).write_bytes(content)
        found = list(damages(folder))
        last = len(content) - 1
        expected = [f"{folder / name}: bytes 0 to {min(63, last)} are not those that were written"]
        if last > 63:
            expected.append(f"{folder / name}: bytes {last // 64 * 64} to {last} are not those that were written")
        assert found == expected
        for place in (0, last):
            content[place] ^= 4
        (folder / name).write_bytes(content)
    assert list(damages(folder)) == []
    manifest = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(manifest.replace('"rows": 50', '"rows": 51'))
    with pytest.raises(UserError, match=r"cache\.json: damaged: not the manifest that was written"):
        open_cache(folder, "train", text_fields(0))


def test_another_format_or_other_fields_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", texts(), text_fields(0))
    with pytest.raises(UserError, match=r"it has no labels, which this task's batches need"):
        open_cache(folder, "train", {**text_fields(0), "labels": Field(("batch",))})
    with pytest.raises(UserError, match=r"its field 'types' is none of this task's \(tokens, weights\)"):
        open_cache(
            folder, "train", {name: kind for name, kind in text_fields(0).items() if name in ("tokens", "weights")}
        )
    body = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, {name: value for name, value in body.items() if name != "sha256"} | {"format": 2})
    with pytest.raises(UserError, match="cache format 2, but this jaxft reads format 1"):
        open_cache(folder, "train", text_fields(0))


class Stop(Exception):
    """Whatever may end a build."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop, UserError])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def failing() -> Iterator[Encoded]:
        yield from texts(3)
        raise error

    with pytest.raises(error):
        write(tmp_path / "a/rows", failing(), text_fields(0))
    assert not (tmp_path / "a/rows").exists()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="rows: cannot be written: File too large; nothing is left of it"):
            write(tmp_path / "rows", texts(3000), text_fields(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "rows").exists()


# Writes without end, and says when so many rows are on the disk.
CHILD = """
import sys
from pathlib import Path
import numpy as np
from jaxft.data import cache
from jaxft.data.batch import text_fields
from jaxft.data.examples import Encoded
cache._BUFFERED = 64
def endless():
    for i in range(1 << 40):
        if i == int(sys.argv[2]):
            print("there", flush=True)
        yield Encoded({"tokens": np.full(5, i % 50_000, np.int32), "types": np.zeros(5, np.int32)}, i)
cache.write_cache(Path(sys.argv[1]), endless(), text_fields(0), {}, lambda split: {})
"""


@pytest.mark.parametrize("rows", [1, 3000])
def test_a_build_that_is_killed_leaves_what_is_refused(tmp_path: Path, rows: int) -> None:
    folder = tmp_path / "rows"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(rows)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"there\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert is_cache(folder)
    with pytest.raises(UserError, match=r"a token cache without its cache\.json, .*: it was not finished"):
        open_cache(folder, "train", text_fields(0))


# ------------------------------------------------------------------------------------------------- rows of every task


def tables(folder: Path) -> None:
    """Rows of all kinds, short and long."""
    rng = np.random.default_rng(0)

    def words(most: int = 40) -> list[str]:
        return [str(word) for word in rng.choice(tiny.WORDS[5:], int(rng.integers(1, most)))]

    tiny.write_tokenizer(folder / "tokenizer")
    for name, count in (("train", 90), ("eval", 30)):
        lines = [
            {"text": " ".join(words()), "pair": " ".join(words(9)), "label": ["b", "a", "c"][i % 3]}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tagged = []
        for i in range(count):
            text = words()
            tags = ["B-X" if word == "red" else "I-X" if word == "green" else "O" for word in text]
            spans = [{"start": 0, "end": len(text[0]), "label": "X"}]
            tagged.append({"text": text, "label": tags} if i % 3 else {"text": " ".join(text), "label": spans})
        (folder / f"{name}_tags.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tagged))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tables(folder)
    return folder


def config_of(home: Path, *more: str, tags: bool = False) -> RunConfig:
    suffix = "_tags" if tags else ""
    return load_config(None, [
        "model.family=bert", f"data.tokenizer={home / 'tokenizer'}", "data.max_length=16", "train.batch_size=8",
        f"data.train={home / f'train{suffix}.jsonl'}", f"data.eval={home / f'eval{suffix}.jsonl'}", "eval.batch_size=8", *more,
    ])  # fmt: skip


def opened(config: RunConfig) -> Rows:
    module = tasks.task(config.task.name)
    return open_rows(settled(config, module), module, processor_of(config, None), None, lambda text: None)


def on_caches(config: RunConfig, folders: tuple[Path, ...]) -> RunConfig:
    named: dict[str, Any] = dict(zip(("train", "eval", "test"), map(str, folders), strict=False)) | {
        "test_fraction": None
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **named))


def assert_same_batches(a: Examples, b: Examples, config: RunConfig) -> None:
    assert a.digest() == b.digest()
    for seed in (3, None):
        ours, theirs = (Batches(one, 8, buckets_of(config), seed) for one in (a, b))
        assert ours.shapes() == theirs.shapes()
        for step in range(2 * ours.steps_per_epoch if seed else ours.steps_per_epoch):
            one, other = ours[step], theirs[step]
            assert one.keys() == other.keys()
            for name in one:
                assert one[name].dtype == other[name].dtype
                assert one[name].tobytes() == other[name].tobytes()


CASES: dict[str, tuple[list[str], bool]] = {
    "classification": ([], False),
    "named-classes": (["data.labels={c: Z, a: Y, b: X}"], False),
    "held-out": (["data.eval=null", "data.eval_fraction=0.2"], False),
    "test-and-groups": (["data.eval=null", "data.test_fraction=0.2", "data.split_group=pair"], False),
    "pairs": (["data.text_pair=pair", "data.buckets=[16]"], False),
    "windows": (["task.name=token_classification", "data.stride=3"], True),
    "windows-held-out": (["task.name=token_classification", "data.eval=null", "task.label_pieces=all"], True),
    "cut-tags": (["task.name=token_classification", "data.long_texts=truncate", "task.scheme=BIOES"], True),
    "masked": (["task.name=masked_lm", "data.long_texts=split"], False),
    "causal-held-out": (["task.name=causal_lm", "data.eval=null"], False),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_are_those_of_rows_in_memory(home: Path, tmp_path: Path, case: str) -> None:
    options, tags = CASES[case]
    config = config_of(home, *options, tags=tags)
    said: list[str] = []
    folders = build_caches(config, tmp_path / "caches", said.append)
    memory, kept = opened(config), opened(on_caches(config, folders))
    assert kept.targets == memory.targets
    assert [folder.name for folder in folders] == [split.name for split, _ in memory.splits]
    assert [count for _, count in kept.splits] == [count for _, count in memory.splits]
    assert isinstance(kept.train, Cache)
    for (ours, _), (theirs, _) in zip(kept.splits, memory.splits, strict=True):
        assert ours.truncated == theirs.truncated
        assert_same_batches(ours, theirs, config)
        if tasks.task(config.task.name).PACKING:
            free = [one for one in options if not one.startswith("data.buckets")]
            packs = config_of(home, *free, "data.packing=best_fit", tags=tags)
            assert_same_batches(pack(ours, 16), pack(theirs, 16), packs)
    assert any(line.startswith(f"{folders[0]}: {memory.count} rows, ") for line in said)


def test_rows_are_read_once_more_and_no_row_is_kept(home: Path, tmp_path: Path) -> None:
    # What a task studies and encodes comes row by row: of a list, it would show at once.
    module = tasks.task("classification")
    config = settled(config_of(home), module)
    tokenizer, asked = processor_of(config, None), []

    def rows() -> Iterator[Any]:
        for i in range(5000):
            asked.append(i)
            yield Row((f"red cat {i}", "ab"[i % 2]), f"row {i}")

    targets = module.study(rows(), config, None, lambda text: None)
    assert targets.labels == ("a", "b")
    asked.clear()
    first = next(iter(module.encode(rows(), tokenizer, targets, config)))
    assert first.row == 0
    assert len(asked) <= 1024


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def caches(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return build_caches(config_of(home), tmp_path_factory.mktemp("built") / "caches", lambda text: None)


def refused(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        opened(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.max_length=12", "a token cache made with data.max_length=16, here it is 12"),
        ("data.text=pair", "made with data.text='text', here it is 'pair'"),
        ("data.text_pair=pair", "made with data.text_pair=None, here it is 'pair'"),
        ("data.missing_text=skip", "made with data.missing_text='refuse', here it is 'skip'"),
        ("data.labels=[a,b,d]", "its labels are ['a', 'b', 'c']; leave it out"),
        ("task.name=masked_lm", "made with task.name='classification', here it is 'masked_lm'"),
    ],
)
def test_a_cache_of_another_run_is_refused(home: Path, caches: tuple[Path, ...], change: str, said: str) -> None:
    found = refused(on_caches(config_of(home, change), caches))
    assert said in found
    assert str(caches[0]) in found


def test_options_that_change_no_row_may_differ(home: Path, caches: tuple[Path, ...]) -> None:
    opened(on_caches(config_of(home, "task.label_smoothing=0.1", "data.buckets=[16]", "data.read_ahead=1"), caches))


def test_an_option_that_changes_rows_may_not(home: Path, tmp_path: Path) -> None:
    options = ["task.name=token_classification", "data.eval=null"]
    built = build_caches(config_of(home, *options, tags=True), tmp_path / "caches", lambda text: None)
    other = config_of(home, *options, "task.label_pieces=all", tags=True)
    assert "made with task.label_pieces='first', here it is 'all'" in refused(on_caches(other, built))


def test_a_cache_knows_what_options_meant_before_there_were_any(
    home: Path, caches: tuple[Path, ...], tmp_path: Path
) -> None:
    older = copied(caches[0], tmp_path / "older")
    body = json.loads((older / MANIFEST).read_text())
    del body["sha256"], body["made"]["data.quotes"]
    write_manifest(older, body)
    opened(on_caches(config_of(home), (older, caches[1])))
    other = on_caches(config_of(home, "data.quotes=none"), (older, caches[1]))
    assert "made with data.quotes='auto', here it is 'none'" in refused(other)


def test_another_tokenizer_is_refused(home: Path, caches: tuple[Path, ...], tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "other", ("purple",))
    config = on_caches(config_of(home, f"data.tokenizer={tmp_path / 'other'}"), caches)
    assert refused(config) == (
        f"{caches[0]}: a token cache made with another tokenizer (that of {home / 'tokenizer'} then, {tmp_path / 'other'} "
        "now, which gives other ids); give what it was made with, or build another: jaxft cache build"
    )
    # The same tokenizer elsewhere is the same.
    tiny.write_tokenizer(tmp_path / "same")
    opened(on_caches(config_of(home, f"data.tokenizer={tmp_path / 'same'}"), caches))


def test_held_out_rows_of_other_labels_are_refused(home: Path, caches: tuple[Path, ...], tmp_path: Path) -> None:
    others = build_caches(config_of(home, "data.labels=[c,b,a]"), tmp_path / "caches", lambda text: None)
    assert refused(on_caches(config_of(home), (caches[0], others[1]))) == (
        f"{others[1]}: a token cache with labels ['c', 'b', 'a'], the training rows have ['a', 'b', 'c']; build both with one "
        "command (jaxft cache build)"
    )
    # Caches and rows may be mixed, where they agree.
    mixed = opened(on_caches(config_of(home), (caches[0], home / "eval.jsonl")))
    assert mixed.eval.split.digest() == open_cache(caches[1], "eval", mixed.eval.split.fields).digest()
    mixed = opened(on_caches(config_of(home), (home / "train.jsonl", caches[1])))
    assert mixed.train.digest() == open_cache(caches[0], "train", mixed.train.fields).digest()


def test_where_a_cache_may_stand(home: Path, caches: tuple[Path, ...], tmp_path: Path, capsys: Capture) -> None:
    out, (train, held_out) = caches[0].parent, caches
    both = on_caches(config_of(home), caches)
    assert refused(on_caches(config_of(home), (out, held_out))) == (
        f"data.train={out} holds token caches; name one: {held_out}, {train}"
    )
    with pytest.raises(UserError, match=r"a token cache, of which no rows can be held out; set data\.eval"):
        opened(load_config(None, [f"data.tokenizer={home / 'tokenizer'}", "data.max_length=16", f"data.train={train}"]))
    several = config_of(home, f"data.train=[{train},{home / 'train.jsonl'}]")
    assert f"{train} is a token cache, which is read alone; build one of all these sources" in refused(several)
    with pytest.raises(UserError, match=r"is a token cache already; name the rows themselves"):
        build_caches(both, tmp_path / "caches", print)
    with pytest.raises(UserError, match=r"standard input can be read once only"):
        build_caches(config_of(home, "data.train=-"), tmp_path / "caches", print)
    with pytest.raises(UserError, match=r"holds token caches already; remove them, or name another --out"):
        build_caches(config_of(home), out, print)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match=r"mine already exists"):
        build_caches(config_of(home), tmp_path / "mine", print)
    assert not (tmp_path / "caches").exists()
    folder = tiny.make_folder(tmp_path / "model", "classification", tiny.LABELS, num_hidden_layers=1)
    assert "is a token cache, which holds no texts" in tiny.refusal(capsys, "predict", folder, train)


def test_a_build_that_was_not_finished_is_begun_anew(home: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "caches", []
    train, held_out = build_caches(config_of(home), out, print)
    (train / MANIFEST).unlink()
    digest = open_cache(held_out, "eval", opened(config_of(home)).train.fields).digest()
    (held_out / "column-tokens.bin.wide").write_bytes(b"of a process that was killed")
    build_caches(config_of(home), out, said.append)
    assert said[0] == f"{out}: holds a build that was not finished; it is begun anew"
    assert opened(on_caches(config_of(home), (train, held_out))).eval.split.digest() == digest
    assert not (held_out / "column-tokens.bin.wide").exists()


def test_an_error_in_a_row_leaves_nothing(home: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((home / "train.jsonl").read_text() + '{"text": "red", "pair": "", "label": null}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:91: column 'label' is empty"):
        build_caches(config_of(home, f"data.train={bad}"), tmp_path / "caches", print)
    (tmp_path / "eval_bad.jsonl").write_text('{"text": "red", "label": "z"}\n')
    with pytest.raises(UserError, match=r"eval_bad\.jsonl:1: unknown label 'z'"):
        build_caches(config_of(home, f"data.eval={tmp_path / 'eval_bad.jsonl'}"), tmp_path / "caches", print)
    assert not (tmp_path / "caches").exists()


# --------------------------------------------------------------------------------------------------- the command line


def test_the_command_builds_verifies_and_says_what_has_changed(tmp_path: Path, capsys: Capture) -> None:
    tables(tmp_path)
    given = [f"data.{name}={tmp_path / f'{name}.jsonl'}" for name in ("train", "eval")]
    given += [f"data.tokenizer={tmp_path / 'tokenizer'}", "model.family=bert", "data.max_length=16"]
    out = tmp_path / "caches"
    code, said, noted = tiny.run(capsys, "cache", "build", *given, "--out", out)
    assert code == 0
    assert said == f"train on them with: data.train={out / 'train'} data.eval={out / 'eval'}\n"
    assert f"{out / 'train'}: 90 rows, " in noted
    assert " rows/s\n" in noted
    whole = f"{out / 'train'}: every byte is as it was written\n"
    assert tiny.run(capsys, "cache", "verify", out / "train") == (0, whole, "")
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("\n")
    code, said, _ = tiny.run(capsys, "cache", "verify", out / "train")
    assert (code, said.splitlines()[1]) == (0, whole.strip())
    assert said.startswith(f"{out / 'train'}: its source {tmp_path / 'train.jsonl'} has changed since")
    path = out / "train/column-tokens.bin"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    code, said, _ = tiny.run(capsys, "cache", "verify", out / "train")
    assert (code, said.splitlines()[0]) == (
        1,
        f"{path}: bytes 0 to {len(content) - 1} are not those that were written",
    )
    path.write_bytes(content[:-1])
    assert "too short: it was cut off" in tiny.refusal(capsys, "cache", "verify", out / "train")
    assert "holds no token cache" in tiny.refusal(capsys, "cache", "verify", tmp_path)
    assert "name the folder of one cache" in tiny.refusal(capsys, "cache", "verify")
    assert "--out FOLDER says where to write" in tiny.refusal(capsys, "cache", "build", *given)
