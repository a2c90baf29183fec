"""Flipped bits, lost files, leftovers of crashes, newer formats: found, named, and passed over."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint import Checkpoints, read_manifest, restore_params, save_params
from jaxft.checkpoint.folders import set_aside
from jaxft.checkpoint.manifest import FORMAT, NAME, _checksum, _render
from jaxft.errors import NothingUsable, UserError

from .states import LIKE, all_files, assert_same, damage_arrays, flip, saved


def assert_fallback(store: Checkpoints, damaged: Path, states: dict[int, Any], caplog: Any) -> None:
    """Asked for by number, the error names the file; else the older step is taken, with one warning."""
    with pytest.raises(UserError) as error:
        store.restore(LIKE, 20)
    assert damaged.name in str(error.value)
    assert "\n" not in str(error.value)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "jaxft.checkpoint"):
        assert_same(store.restore(LIKE).state, states[10])
    warnings = [record for record in caplog.records if record.name == "jaxft.checkpoint"]
    assert len(warnings) == 1
    assert damaged.name in warnings[0].getMessage()


def test_one_flipped_bit_in_any_file_is_found(store: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    states = saved(store, 10, 20)
    folder = store.folder / "20"
    rng = np.random.default_rng(0)
    flipped = 0
    for name in all_files(folder):
        original = (folder / name).read_bytes()
        for bit in rng.integers(0, 8 * len(original), 2) if original else ():
            flip(folder / name, int(bit))
            assert_fallback(store, folder / name, states, caplog)
            (folder / name).write_bytes(original)
            flipped += 1
    assert flipped > 20
    assert_same(store.restore(LIKE).state, states[20])


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    save_params(tmp_path / "p", {"a": jnp.zeros(1)}, {"labels": ["x", "y"], "loss": 0.25})
    path = tmp_path / "p" / NAME
    original = path.read_bytes()
    for bit in range(0, 8 * len(original), 7):
        flip(path, bit)
        with pytest.raises(UserError, match=NAME):
            read_manifest(path.parent)
        path.write_bytes(original)


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_truncated_and_deleted_files(store: Checkpoints, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    states = saved(store, 10, 20)
    folder = store.folder / "20"
    for name in all_files(folder):
        original = (folder / name).read_bytes()
        if damage == "truncated" and original:
            (folder / name).write_bytes(original[:-1])
        elif damage == "deleted" and name != NAME:
            (folder / name).unlink()
        else:
            continue
        assert_fallback(store, folder / name, states, caplog)
        (folder / name).write_bytes(original)


def test_training_goes_on_after_a_damaged_step(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    saved(Checkpoints(tmp_path, keep=2), 10, 20)
    damage_arrays(tmp_path / "20")
    assert store.restore(LIKE).step == 10
    saved(store, 15)
    assert store.steps() == (15,)
    flip(tmp_path / "15" / NAME, 99)
    with pytest.raises(UserError, match=r"its only checkpoint, step 15: .*jaxft\.json: damaged"):
        store.restore(LIKE)
    states = saved(store, 15)
    assert_same(store.restore(LIKE).state, states[15])


def test_without_hashes_missing_files_are_still_found(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2, verify=False)
    states = saved(store, 10, 20)
    (tmp_path / "20" / "params" / "manifest.ocdbt").unlink()
    assert_same(store.restore(LIKE).state, states[10])


def test_leftovers_are_cleaned_and_nothing_else(store: Checkpoints) -> None:
    saved(store, 10, 20)
    leftovers = ["30.orbax-checkpoint-tmp", "31.orbax-checkpoint-tmp-17", ".deleting-5-0123abcd", ".saving-40"]
    foreign = ["2024", "notes", "old.orbax-checkpoint-tmp.bak"]
    for name in leftovers + foreign:
        (store.folder / name).mkdir()
    (store.folder / ".saving-40" / "params").mkdir()
    again = Checkpoints(store.folder, keep=2)
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(["10", "20", *foreign])
    assert again.steps() == (10, 20)


def test_a_save_that_lacked_only_its_name_is_finished(store: Checkpoints) -> None:
    states = saved(store, 10, 20)
    (store.folder / "20").rename(store.folder / ".saving-20")
    assert store.steps() == (10,)
    again = Checkpoints(store.folder, keep=2)
    assert again.steps() == (10, 20)
    assert_same(again.restore(LIKE).state, states[20])


@pytest.mark.parametrize("lost", ["deleted", "flipped"])
def test_a_step_without_its_seal_is_passed_over_once_and_set_aside(
    tmp_path: Path, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = saved(Checkpoints(tmp_path, keep=2), 10, 20)
    wanted = {name: (tmp_path / "20" / name).read_bytes() for name in all_files(tmp_path / "20") if name != NAME}
    flip(tmp_path / "20" / NAME, 99) if lost == "flipped" else (tmp_path / "20" / NAME).unlink()
    store = Checkpoints(tmp_path, keep=2)
    with caplog.at_level(logging.WARNING, "jaxft.checkpoint"):
        assert_same(store.restore(LIKE).state, states[10])
    assert len(caplog.records) == 1
    assert f"20/{NAME}" in caplog.text
    assert (tmp_path / "20").is_dir()
    caplog.clear()
    assert_same(saved(store, 20)[20], store.restore(LIKE, 20).state)  # training comes by it again
    assert [("moved to .aside-20" in record.getMessage()) for record in caplog.records] == [True]
    (aside,) = set_aside(tmp_path)
    assert {name: (aside / name).read_bytes() for name in all_files(aside) if name != NAME} == wanted


@pytest.mark.parametrize("damage", ["flipped", "deleted", "files"])
def test_nothing_usable_ends_with_its_own_code_and_removes_nothing(tmp_path: Path, damage: str) -> None:
    saved(Checkpoints(tmp_path / "checkpoints", keep=2), 10, 20)
    for step in ("10", "20"):
        path = tmp_path / "checkpoints" / step
        if damage == "files":
            damage_arrays(path)
        elif damage == "flipped":
            flip(path / NAME, 99)
        else:
            (path / NAME).unlink()
    there = all_files(tmp_path)
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert not store.empty()
    for use in (lambda: store.restore(LIKE), lambda: restore_params(tmp_path)):
        with pytest.raises(
            NothingUsable, match=r"all of its 2 checkpoints are damaged; the newest, step 20: "
        ) as error:
            use()
        assert "jaxft checkpoint list" in str(error.value)
        assert str(tmp_path / "checkpoints/20") in str(error.value)
    assert all_files(tmp_path) == there


def test_what_is_set_aside_is_bounded(tmp_path: Path) -> None:
    saved(Checkpoints(tmp_path, keep=9), *range(1, 7))
    for step in (2, 3, 4):
        (tmp_path / str(step) / NAME).unlink()
    store = Checkpoints(tmp_path, keep=2)
    saved(store, 7)
    assert store.steps() == (6, 7)
    assert [path.name.split("-")[1] for path in set_aside(tmp_path)] == ["4", "3"]
    assert len(list(tmp_path.iterdir())) == 4


def test_newer_format_is_refused(store: Checkpoints) -> None:
    saved(store, 10, 20)
    path = store.folder / "20" / NAME
    body = json.loads(path.read_text()) | {"format": FORMAT + 1}
    del body["sha256"]
    path.write_text(_render({**body, "sha256": _checksum(body)}))
    for use in (store.steps, lambda: store.restore(LIKE), lambda: read_manifest(path.parent)):
        with pytest.raises(
            UserError, match=f"checkpoint format {FORMAT + 1}, but this jaxft reads format {FORMAT}; update jaxft"
        ):
            use()
