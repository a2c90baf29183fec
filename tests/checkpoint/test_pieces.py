"""States in pieces, a file per process: the devices of this process stand for those of several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxft.checkpoint import layout, open_params, pieces, read_manifest, restore_params
from jaxft.checkpoint.content import load_checked
from jaxft.checkpoint.manifest import (
    FORMAT,
    NAME,
    DamagedCheckpoint,
    Manifest,
    check_files,
    hash_and_sync,
    render,
)
from jaxft.trees import nested

from .states import assert_same

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_v2"
AXES = ("data", "fsdp")
DTYPES = ("float32", "bfloat16", "int32", "bool")


@contextmanager
def several(count: int, number: int) -> Iterator[None]:
    """The devices of this process as those of ``count`` processes, of which it is one."""
    each = jax.device_count() // count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "processes", lambda: count)
        patch.setattr(pieces, "this_process", lambda: number)
        patch.setattr(pieces, "process_of", lambda device: device.id // each)
        yield


def stored(folder: Path, flat: dict[str, Any], count: int) -> Manifest:
    """Writes a state as so many processes do, and its manifest."""
    shares = []
    for number in range(count):
        with several(count, number):
            shares.append(pieces.share_of(flat))
            pieces.write(folder, shares[-1])
    assert all(share.pieces == shares[0].pieces for share in shares)
    assert not any(set(a.files) & set(b.files) for i, a in enumerate(shares) for b in shares[:i])
    tree = layout.specs_of(flat)
    made = Manifest(FORMAT, "state", 3, False, tree, {}, hash_and_sync(folder), shares[0].pieces)
    (folder / NAME).write_text(render(made))
    return made


def sharding(sizes: tuple[int, int], spec: tuple[str | None, ...]) -> NamedSharding:
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    return NamedSharding(mesh, PartitionSpec(*spec))


SPECS: tuple[tuple[str | None, ...], ...] = (
    (),
    ("data",),
    ("fsdp",),
    (None, "fsdp"),
    ("data", "fsdp"),
    ("fsdp", "data"),
)
SHAPES = ((), (8,), (8, 16), (16, 8), (8, 8, 3))


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[str | None, ...]]:
    shape = draw(st.sampled_from(SHAPES))
    spec = draw(st.sampled_from([spec for spec in SPECS if len(spec) <= len(shape)]))
    return draw(st.sampled_from(DTYPES)), shape, spec


@settings(deadline=None, max_examples=15)
@given(
    st.lists(arrays(), min_size=1, max_size=4),
    st.sampled_from([(8, 1), (4, 2), (2, 4), (1, 8)]),
    st.sampled_from([(1, 1), (8, 1), (2, 4), (4, 1), (1, 2)]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2**31),
)
def test_a_state_comes_back_on_any_mesh_and_number_of_processes(
    tmp_path_factory: pytest.TempPathFactory,
    said: list[tuple[str, tuple[int, ...], tuple[str | None, ...]]],
    before: tuple[int, int],
    after: tuple[int, int],
    count: int,
    later: int,
    seed: int,
) -> None:
    folder, rng = tmp_path_factory.mktemp("state"), np.random.default_rng(seed)
    values = {
        f"params/w{i}": np.asarray(rng.normal(size=shape) * 9, jnp.dtype(d)) for i, (d, shape, _) in enumerate(said)
    }
    values["step"] = np.array(7, np.int32)
    specs = {f"params/w{i}": spec for i, (_, _, spec) in enumerate(said)} | {"step": ()}
    flat = {path: jax.device_put(value, sharding(before, specs[path])) for path, value in values.items()}
    manifest = stored(folder, flat, count)
    assert read_manifest(folder) == manifest
    like = {p: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding(after, specs[p])) for p, v in values.items()}
    assert_same(load_checked(folder, like, verified=True), {p: jnp.asarray(v) for p, v in values.items()})
    assert_same(load_checked(folder, values, verified=True), values)
    needed = [pieces.files_for(manifest, share_like(like, later, number)) for number in range(later)]
    assert set.union(*needed) <= manifest.files.keys()


def share_like(like: dict[str, Any], count: int, number: int) -> dict[str, Any]:
    """What one of several processes restores, as a mesh of its own devices has it."""
    mine = jax.devices()[number * (8 // count)]
    return {p: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=SingleDeviceSharding(mine)) for p, v in like.items()}


def test_what_several_hold_is_written_once_and_by_turns(tmp_path: Path) -> None:
    whole = sharding((2, 4), ())
    flat = {f"params/w{i}": jax.device_put(np.full(1000, i, np.float32), whole) for i in range(8)}
    manifest = stored(tmp_path, flat, 4)
    assert [some[0].part for some in manifest.pieces.values()] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert sum(file.size for file in manifest.files.values()) < 8 * 4000 + 64 * 8


def test_a_process_reads_its_own_files_alone(tmp_path: Path) -> None:
    rows = sharding((8, 1), ("data",))
    flat = {"params/w": jax.device_put(np.arange(64.0, dtype=np.float32), rows)}
    manifest = stored(tmp_path, flat, 4)
    like = {"params/w": jax.ShapeDtypeStruct((64,), np.float32, sharding=rows)}
    assert pieces.files_for(manifest, like) == {f"params/part-{number:05d}" for number in range(4)}
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    one = NamedSharding(mesh, PartitionSpec("data"))
    part = {"params/w": jax.ShapeDtypeStruct((64,), np.float32, sharding=one)}
    for name in manifest.files:
        if name != "params/part-00001":
            check_files(tmp_path, manifest, hashes=True, names=[name])
    (tmp_path / "params" / "part-00001").unlink()
    with pytest.raises(DamagedCheckpoint, match="part-00001: checkpoint damaged: this file is missing"):
        check_files(tmp_path, manifest, hashes=True, names=pieces.files_for(manifest, part))


def test_parameters_alone_are_read_of_a_state_in_pieces(tmp_path: Path) -> None:
    values = {"params/a/w": np.arange(32, dtype=np.float32).reshape(8, 4), "opt_state/m": np.ones(8, np.float32)}
    flat = {path: jax.device_put(value, sharding((8, 1), ("data",))) for path, value in values.items()}
    stored(tmp_path, flat, 2)
    for part in (tmp_path / "opt_state").iterdir():
        part.write_bytes(b"damaged")
    with pytest.raises(DamagedCheckpoint):
        check_files(tmp_path, read_manifest(tmp_path), hashes=True)
    (tmp_path / "opt_state" / "part-00000").unlink()
    found, _ = restore_params(tmp_path)
    assert_same(found, nested({"a/w": values["params/a/w"]}))
    opened, _ = open_params(tmp_path)
    assert np.asarray(layout.flatten(opened)["a/w"]).tobytes() == values["params/a/w"].tobytes()


def test_a_changed_byte_is_damage(tmp_path: Path) -> None:
    flat = {"params/w": jax.device_put(np.arange(64.0, dtype=np.float32), sharding((8, 1), ("data",)))}
    stored(tmp_path, flat, 2)
    path = tmp_path / "params" / "part-00001"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 16
    path.write_bytes(raw)
    with pytest.raises(DamagedCheckpoint, match="part-00001: checkpoint damaged: this file does not match its sha256"):
        restore_params(tmp_path)


def _gap(body: dict[str, Any]) -> None:
    del body["pieces"]["params/w"][1]


def _twice(body: dict[str, Any]) -> None:
    body["pieces"]["params/w"][1] = body["pieces"]["params/w"][0]


def _over(body: dict[str, Any]) -> None:
    body["pieces"]["params/w"][1][0] = [20]


def _none(body: dict[str, Any]) -> None:
    del body["pieces"]


def _text(body: dict[str, Any]) -> None:
    body["pieces"]["params/w"][0] = "0"


def _minus(body: dict[str, Any]) -> None:
    body["pieces"]["params/w"][0][3] = -64


@pytest.mark.parametrize("change", [_gap, _twice, _over, _none, _text, _minus])
def test_manifests_that_no_jaxft_writes_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    flat = {"params/w": jax.device_put(np.arange(64.0, dtype=np.float32), sharding((2, 1), ("data",)))}
    stored(tmp_path, flat, 2)
    resealed(tmp_path, change)
    with pytest.raises(DamagedCheckpoint, match="as no jaxft writes it"):
        read_manifest(tmp_path)


def test_places_beyond_a_file_are_refused(tmp_path: Path) -> None:
    flat = {"params/w": jax.device_put(np.arange(64.0, dtype=np.float32), sharding((2, 1), ("data",)))}
    stored(tmp_path, flat, 2)
    resealed(tmp_path, lambda body: body["pieces"]["params/w"][0].__setitem__(3, 640))
    with pytest.raises(DamagedCheckpoint, match="params/w is not where its manifest says"):
        restore_params(tmp_path)


def resealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest, and gives it the checksum that it has then."""
    from jaxft.checkpoint import manifest

    body = json.loads((folder / NAME).read_text())
    del body["sha256"]
    change(body)
    (folder / NAME).write_text(manifest._render({**body, "sha256": manifest._checksum(body)}))


def test_checkpoints_of_format_2_are_still_read() -> None:
    """The folder was written by two processes when format 2 was new, and is never written again."""
    params, meta = restore_params(GOLDEN)
    assert meta["note"] == "written once; must be read for ever"
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7
    bias = np.array([1.5, -2, 0.125, 4], jnp.bfloat16)
    assert_same(params, {"layers": {"kernel": kernel, "bias": bias}, "count": np.array(3, np.int32)})
    assert len({piece.part for some in read_manifest(GOLDEN).pieces.values() for piece in some}) == 2
