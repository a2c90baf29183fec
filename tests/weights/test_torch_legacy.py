"""Files of torch before 1.6: against torch where it is installed, and against files that want to do something else."""

from __future__ import annotations

import os
import pickle
import shlex
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.hub.weights import open_weights

from .test_torch_file import FLOATS, MALFORMED, RUNS_CODE, named, number, numbers, opened, refusal, state_dict, text

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
OWN_FOLDER = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tensor(shape=(2, 3), stride=(3, 1), offset=0, key="7", length=6, storage="FloatStorage", device="cpu", view=b"N"):
    identity = (
        b"(" + text("storage") + named("torch", storage) + text(key) + text(device) + number(length) + view + b"tQ"
    )
    made = named("torch._utils", "_rebuild_tensor_v2") + b"(" + identity + number(offset)
    return made + numbers(*shape) + numbers(*stride) + b"\x89" + named("collections", "OrderedDict") + b")RtR"


def legacy(
    path: Path,
    described: bytes,
    *,
    version: int = 1001,
    machine: object = None,
    keys: object = None,
    data: bytes | None = None,
) -> Path:
    """A file with one storage, of key 7, unless said otherwise."""
    stored = struct.pack("<q", 6) + FLOATS.tobytes() if data is None else data
    heads = [MAGIC, pickle.dumps(version, 2), pickle.dumps(MACHINE if machine is None else machine, 2), described]
    path.write_bytes(b"".join(heads) + pickle.dumps(["7"] if keys is None else keys, 2) + stored)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def read(path: Path, name: str = "a") -> np.ndarray:
    with open_weights(path) as weights:
        return weights.read(name)


def test_reads_views_and_what_was_on_a_gpu(model: Path) -> None:
    legacy(model, state_dict(a=tensor(device="cuda:3"), b=tensor((3, 2), (1, 3))))
    assert np.array_equal(read(model), FLOATS.reshape(2, 3))
    assert np.array_equal(read(model, "b"), FLOATS.reshape(2, 3).T)


def test_reads_what_python_2_wrote(model: Path) -> None:
    described = state_dict(a=tensor())
    for word in ("a", "storage", "7", "cpu"):
        described = described.replace(text(word), b"U" + bytes([len(word)]) + word.encode())
    assert np.array_equal(read(legacy(model, described)), FLOATS.reshape(2, 3))


@pytest.mark.parametrize("case", RUNS_CODE)
@pytest.mark.parametrize("place", ["described", "first", "keys"])
def test_refuses_to_run_code(model: Path, monkeypatch: pytest.MonkeyPatch, case: str, place: str) -> None:
    monkeypatch.chdir(model.parent)
    evil = RUNS_CODE[case][0].replace(number(6) + b"tQ", number(6) + b"NtQ")
    if place == "described":
        legacy(model, evil)
    elif place == "first":
        model.write_bytes(MAGIC[:-1] + b"0" + evil)  # the magic number is dropped again: POP
    else:
        legacy(model, state_dict(a=tensor()))
        model.write_bytes(model.read_bytes().replace(pickle.dumps(["7"], 2), evil))
    message = refusal(model)
    if place == "described":
        assert RUNS_CODE[case][1] in message
    assert os.listdir(model.parent) == [model.name]


MALFORMED_STORAGES: dict[str, dict[str, Any]] = {
    "wrong version": {"version": 1000},
    "another byte order": {"machine": MACHINE | {"little_endian": False}},
    "no facts of the machine": {"machine": 3},
    "a storage too many": {"keys": ["7", "8"]},
    "no storage": {"keys": []},
    "a storage twice": {"keys": ["7", "7"]},
    "keys that are a dict": {"keys": {"7": 1}},
    "another key": {"keys": ["8"]},
    "cut off": {"data": struct.pack("<q", 6) + FLOATS.tobytes()[:-1]},
    "without size": {"data": FLOATS.tobytes()},
    "nothing": {"data": b""},
    "another size": {"data": struct.pack("<q", 5) + FLOATS.tobytes()},
    "negative size": {"data": struct.pack("<q", -6) + FLOATS.tobytes()},
    "left over": {"data": struct.pack("<q", 6) + FLOATS.tobytes() + b"0"},
}


@pytest.mark.parametrize("case", MALFORMED_STORAGES)
def test_malformed_storages(model: Path, case: str) -> None:
    refusal(legacy(model, state_dict(a=tensor()), **MALFORMED_STORAGES[case]))


@pytest.mark.parametrize(
    "described",
    [
        state_dict(a=tensor(view=numbers(1, 2))),  # a view of another storage
        state_dict(a=tensor(length=7)),
        state_dict(a=tensor(length=-6)),
        state_dict(a=tensor(length=1 << 62)),
        state_dict(a=tensor(length=1 << 200)),
        state_dict(a=tensor(storage="DoubleStorage")),
        state_dict(a=tensor(), b=tensor(storage="IntStorage")),  # one storage of two types
        state_dict(a=tensor(offset=1)),
        state_dict(a=tensor(stride=(1 << 70, 1))),
        state_dict(a=tensor(shape=(1 << 61, 1 << 61), stride=(0, 0))),
        state_dict(a=tensor()).replace(text("a"), b"U\x01\xff"),  # no text
        b"\x80\x02X\xff\xff\xff\x7fabc",  # text of 2 GB
        b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
        b"\x80\x02" + b"c" + b"x" * 3000,  # a line without end
        *(
            MALFORMED[case]
            for case in ("no stop", "empty stack", "mark left", "two keys", "truncated", "billion laughs", "self")
        ),
    ],
)
def test_malformed_pickles(model: Path, described: bytes) -> None:
    refusal(legacy(model, described))


def test_what_is_no_such_file(model: Path) -> None:
    for raw in (MAGIC, MAGIC[:10], pickle.dumps({"a": 1}), b"\x80"):
        model.write_bytes(raw)
        refusal(model)


@OWN_FOLDER
@given(
    edits=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=4),
    cut=st.just(0) | st.integers(0, 400),
)
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int) -> None:
    folder = tmp_path_factory.mktemp("damage")
    path = legacy(folder / "pytorch_model.bin", state_dict(a=tensor(), b=tensor((6,), (1,))))
    raw = bytearray(path.read_bytes())
    for position, value in edits:
        raw[position % len(raw)] = value
    path.write_bytes(raw[: max(0, len(raw) - cut)])
    assert "\n" not in opened(path)


def test_what_torch_saves(model: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.randn(6, 5)
    state = {
        "whole": base, "transposed": base.t(), "part": base[1:3, ::2], "long": torch.arange(7), "half": base.half(),
        "bfloat16": base.bfloat16(), "bool": base > 0, "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(base),
    }  # fmt: skip
    state |= torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).state_dict()
    for protocol in (2, 4):
        torch.save(state, model, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        with open_weights(model.parent) as weights:
            assert set(weights.names()) == set(state)
            for name, expected in state.items():
                assert np.array_equal(weights.read(name).astype(np.float64), expected.detach().double().numpy()), name


@pytest.mark.parametrize("zipped", [True, False])
def test_the_advice_works_as_it_is_pasted(tmp_path: Path, zipped: bool) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / 'it\'s a "folder"'
    folder.mkdir()
    path = folder / "pytorch_model.bin"
    plain = {"a": torch.ones(2), "b": torch.zeros(3).expand(4, 3).contiguous()}
    for saved in ({"epoch": 3, "state_dict": plain}, {"a": torch.ones(2), "b": torch.zeros(3).expand(4, 3)}):
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError) as caught:
            open_weights(path)
        python, option, script = shlex.split(str(caught.value)[str(caught.value).index("python -c ") :])
        assert (python, option) == ("python", "-c")
        exec(script, {})
        with open_weights(path) as weights:
            assert all(np.array_equal(weights.read(name), expected.numpy()) for name, expected in plain.items())
