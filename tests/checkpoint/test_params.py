"""Parameters alone, parameters out of full states, and the oldest format."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxft.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    is_checkpoint,
    layout,
    open_params,
    read_manifest,
    restore_params,
    save_params,
)
from jaxft.errors import UserError

from .states import assert_same, damage_arrays, random_params, shaped, trained_state

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_v1"


def test_params_alone(tmp_path: Path) -> None:
    params = random_params(3, jnp.bfloat16)
    save_params(tmp_path / "out", params, {"family": "bert"})
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.kind, manifest.format, manifest.step) == ("params", 1, None)
    assert str(manifest.tree["params/layers/mlp/kernel"]) == "bfloat16[2, 8, 24]"
    found, meta = restore_params(tmp_path / "out")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert_same(found, params)
    assert meta["family"] == "bert"
    assert_same(restore_params(tmp_path / "out", shaped(params, SingleDeviceSharding(jax.devices()[3])))[0], params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(UserError, match="already exists"):
        save_params(tmp_path / "out", params, {})
    with pytest.raises(UserError, match=r"embed/kernel: bfloat16\[16, 8\] in the checkpoint, expected float32"):
        restore_params(tmp_path / "out", shaped(random_params()))


def test_params_from_a_full_state_without_its_optimizer(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", keep=3)
    states = {step: trained_state(step, ema=0.9) for step in (1, 2, 3)}
    for step, state in states.items():
        store.save(step, state, {"at": step}, best=step == 2)
    store.close()
    shutil.rmtree(store.folder / "2" / "opt_state" / "d")
    assert_same(restore_params(store.folder / "3", average=False)[0], states[3].params)
    for place in (tmp_path, store.folder):
        assert is_checkpoint(place)
        with pytest.raises(UserError, match="opt_state"):
            store.restore(shaped(states[2]), 2)
    # The files of another group may be missing, but their sizes are not even looked at.
    found, meta = restore_params(tmp_path)
    assert meta["at"] == 2
    assert_same(found, states[2].ema)
    damage_arrays(store.folder / "2" / "ema")
    found, meta = restore_params(tmp_path, average=False)
    assert meta["at"] == 2
    found, meta = restore_params(tmp_path)
    assert meta["at"] == 3
    assert_same(found, states[3].ema)


def test_is_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "nowhere")
    assert not is_checkpoint(tmp_path / "config.json")
    with pytest.raises(UserError, match="no jaxft checkpoint here"):
        restore_params(tmp_path)
    with pytest.raises(UserError, match="is not a jaxft checkpoint"):
        read_manifest(tmp_path / "3")


def test_checkpoints_of_format_1_are_still_read() -> None:
    """The folder was written when format 1 was new (jaxft 0.1.0, orbax 0.12.8) and is never written again."""
    params, meta = restore_params(GOLDEN)
    assert meta["note"] == "written once; must be read for ever"
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7
    assert_same(params, {"layers": {"kernel": kernel, "bias": np.array([1.5, -2, 0.125], jnp.bfloat16)},
                         "count": np.array(3, np.int32)})  # fmt: skip


def test_arrays_of_an_open_checkpoint_are_read_when_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = random_params()
    save_params(tmp_path / "out", params, {"note": 1})
    read: list[str] = []
    real = layout.load_one
    monkeypatch.setattr(
        layout, "load_one", lambda folder, path, *more: (read.append(path), real(folder, path, *more))[1]
    )
    found, meta = open_params(tmp_path / "out")
    assert (meta["note"], read) == (1, [])
    flat, wanted = layout.flatten(found), layout.flatten(params)
    assert layout.specs_of(flat) == layout.specs_of(wanted)
    for path, leaf in flat.items():
        for _ in range(2):  # the second time from memory
            assert np.asarray(leaf).tobytes() == np.asarray(wanted[path]).tobytes()
        assert leaf[0].tobytes() == np.asarray(wanted[path])[0].tobytes() if leaf.ndim else True
    assert read == [f"params/{path}" for path in flat]


def test_an_open_checkpoint_is_compared_with_its_hashes_first(tmp_path: Path) -> None:
    save_params(tmp_path / "out", random_params(), {})
    file = max(
        (path for path in (tmp_path / "out/params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint):
        open_params(tmp_path / "out")
