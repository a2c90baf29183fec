"""pytorch_model.bin: against torch where it is installed, and against files that want to do something else."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.hub.weights import open_weights

OWN_FOLDER = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
FLOATS = np.arange(6, dtype=np.float32)


# Writing the format without torch: pickle opcodes by hand, so that these tests run everywhere.
def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor(shape=(2, 3), stride=(3, 1), offset=0, key="0", length=6, storage="FloatStorage") -> bytes:
    identity = b"(" + text("storage") + named("torch", storage) + text(key) + text("cpu") + number(length) + b"tQ"
    hooks = named("collections", "OrderedDict") + b")R"
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + identity
        + number(offset)
        + numbers(*shape)
        + numbers(*stride)
        + b"\x89"
        + hooks
        + b"tR"
    )


def state_dict(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    stored = {"data.pkl": pickled, "byteorder": b"little", "data/0": FLOATS.tobytes()}
    stored |= {name.replace("__", "/"): raw for name, raw in records.items()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, raw in stored.items():
            file.writestr(f"archive/{name}", raw)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_weights(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.fixture
def model(tmp_path) -> Path:
    return tmp_path / "pytorch_model.bin"


def test_reads_views(model):
    views = {
        "whole": (tensor(), FLOATS.reshape(2, 3)),
        "transposed": (tensor((3, 2), (1, 3)), FLOATS.reshape(2, 3).T),
        "column": (tensor((2,), (3,), 1), FLOATS[1::3]),
        "overlapping": (tensor((3, 2), (1, 1)), np.array([[0, 1], [1, 2], [2, 3]], np.float32)),
        "scalar": (tensor((), (), 4), FLOATS[4]),
        "unit": (tensor((1, 6), (99, 1)), FLOATS[None]),
    }
    archive(model, state_dict(**{name: raw for name, (raw, _) in views.items()}))
    with open_weights(model.parent) as weights:
        assert weights.format == "pytorch"
        for name, (_, expected) in views.items():
            assert np.array_equal(weights.read(name), expected)
            assert weights.shape(name) == expected.shape
            for start in range(expected.shape[0] if expected.ndim else 0):
                assert np.array_equal(weights.read_rows(name, start, start + 1), expected[start : start + 1])


def test_reads_what_was_on_a_gpu(model):
    archive(model, state_dict(a=tensor().replace(text("cpu"), text("cuda:1"))))
    with open_weights(model) as weights:
        assert np.array_equal(weights.read("a"), FLOATS.reshape(2, 3))


RUNS_CODE = {
    "reduce": (b"\x80\x02" + named("os", "system") + b"(" + text("touch PWNED") + b"tR.", "'os.system'"),
    "nested": (state_dict(a=named("os", "system") + b"(" + text("touch PWNED") + b"tR"), "'os.system'"),
    "dotted": (b"\x80\x04" + text("torch._utils") + text("os.system") + b"\x93.", "os.system"),
    "stack global": (
        b"\x80\x04" + text("os") + text("system") + b"\x93(" + text("touch PWNED") + b"tR.",
        "'os.system'",
    ),
    "stack global of numbers": (b"\x80\x04K\x01K\x02\x93.", "not text"),
    "inst": (b"(" + text("touch PWNED") + b"ios\nsystem\n.", "INST 'os system'"),
    "obj": (b"(" + named("os", "system") + text("touch PWNED") + b"o.", "'os.system'"),
    "obj of an allowed name": (b"(" + named("collections", "OrderedDict") + b"o.", "OBJ"),
    "newobj": (b"\x80\x02" + named("collections", "OrderedDict") + b")\x81.", "NEWOBJ"),
    "eval": (b"\x80\x02" + named("builtins", "eval") + b"(" + text("1") + b"tR.", "'builtins.eval'"),
    "getattr": (b"\x80\x02" + named("builtins", "getattr") + b".", "'builtins.getattr'"),
    "other torch function": (b"\x80\x02" + named("torch.serialization", "load") + b".", "'torch.serialization.load'"),
    "storage of another module": (b"\x80\x02" + named("evil", "FloatStorage") + b".", "'evil.FloatStorage'"),
    "space in the module": (b"\x80\x02" + named("torch _utils", "x") + b".", "torch"),
    "calls a storage": (b"\x80\x02" + named("torch", "FloatStorage") + b"(tR.", "unexpected arguments"),
    "calls a call's result": (b"\x80\x02" + tensor() + b"(tR.", "not a known function"),
    "OrderedDict with arguments": (
        b"\x80\x02" + named("collections", "OrderedDict") + b"(]tR.",
        "unexpected arguments",
    ),
    "build on a tensor": (b"\x80\x02" + tensor() + b"}b.", "BUILD"),
    "build on a global": (b"\x80\x02" + named("collections", "OrderedDict") + b"}b.", "BUILD"),
    "build on a dict": (b"\x80\x02}}b.", "BUILD"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "text persistent id": (b"Pstorage\n.", "PERSID"),
    "buffers": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "memo overwritten": (
        # An allowed name in memo 0, then another name put over it: the lookup must not matter.
        b"\x80\x02" + named("collections", "OrderedDict") + b"q\x00" + named("os", "system") + b"q\x00h\x00)R.",
        "'os.system'",
    ),
    "number as key": (b"\x80\x02}(K\x01K\x02u.", "key of type int"),
}


@pytest.mark.parametrize("case", RUNS_CODE)
def test_refuses_to_run_code(model, monkeypatch, case):
    monkeypatch.chdir(model.parent)
    pickled, part = RUNS_CODE[case]
    message = refusal(archive(model, pickled))
    assert part in message
    assert os.listdir(model.parent) == [model.name]


def test_what_pickle_itself_would_run(model, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch PWNED",)

    monkeypatch.chdir(model.parent)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in (Evil(), {"a": Evil()}, OrderedDict(a=[(Evil(),)])):
            message = refusal(archive(model, pickle.dumps(value, protocol)))
            assert "system" in message or "instruction" in message
    assert os.listdir(model.parent) == [model.name]


MALFORMED = {
    "empty": b"",
    "no stop": b"\x80\x02}",
    "after stop": state_dict(a=tensor()) + b"}.",
    "empty stack": b"\x80\x02.",
    "pop of nothing": b"\x80\x02R.",
    "mark missing": b"\x80\x02}u.",
    "memo missing": b"\x80\x02h\x07.",
    "memo of nothing": b"\x80\x02q\x00.",
    "mark left": b"\x80\x02(}.",
    "odd items": b"\x80\x02}(" + text("a") + b"u.",
    "items of a list": b"\x80\x02](" + text("a") + b"Nu.",
    "append to a dict": b"\x80\x02}Na.",
    "two keys": b"\x80\x02}(" + (text("a") + tensor()) * 2 + b"u.",
    "truncated": state_dict(a=tensor())[:-20],
    "long text": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
    "surrogate": b"\x80\x02}(X\x03\x00\x00\x00\xed\xa0\x80" + tensor() + b"u.",
    "storage of nothing": b"\x80\x02NQ.",
    "storage of a global": state_dict(a=tensor()).replace(
        b"ctorch\nFloatStorage\n", named("collections", "OrderedDict")
    ),
    "shape of text": state_dict(a=tensor().replace(numbers(2, 3), b"(" + text("2") + text("3") + b"t")),
    "shape of booleans": state_dict(a=tensor().replace(numbers(2, 3), b"(\x88\x88t")),
    "storage too small": state_dict(a=tensor((2, 4), (4, 1))),
    "offset": state_dict(a=tensor(offset=1)),
    "negative offset": state_dict(a=tensor(offset=-1)),
    "negative stride": state_dict(a=tensor(stride=(-3, 1))),
    "huge stride": state_dict(a=tensor(stride=(1 << 70, 1))),
    "huge shape": state_dict(a=tensor(shape=(1 << 61, 1 << 61), stride=(0, 0))),
    "huge dimension": state_dict(a=tensor(shape=(1 << 80, 1), stride=(0, 0))),
    "negative shape": state_dict(a=tensor(shape=(-2, -3))),
    "zero shape": state_dict(a=tensor(shape=(0, 3))),
    "rank": state_dict(a=tensor(shape=(1,) * 9, stride=(1,) * 9)),
    "ranks differ": state_dict(a=tensor(stride=(1,))),
    "length lies": state_dict(a=tensor(length=7)),
    "length in other units": state_dict(a=tensor(storage="DoubleStorage")),
    "no such storage": state_dict(a=tensor(key="1")),
    "storage outside data": state_dict(a=tensor(key="../data.pkl")),
    "billion laughs": b"\x80\x02N" + b"\x85q\x00h\x00h\x00\x86" * 200 + b".",
    "self": b"\x80\x02}q\x00(" + text("a") + b"h\x00u.",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pickles(model, case):
    refusal(archive(model, MALFORMED[case]))


def test_expanded_views_are_refused(model):
    assert "expanded" in refusal(archive(model, state_dict(a=tensor((1 << 40,), (0,)))))


def test_nested_dicts_are_refused(model):
    nested = state_dict(state_dict=b"}" + text("a") + tensor() + b"s")
    assert "not a dict around it" in refusal(archive(model, nested))
    assert "no dict of tensors" in refusal(archive(model, b"\x80\x02" + tensor() + b"."))
    assert "holds no tensors" in refusal(archive(model, state_dict()))


def test_bad_archives(model):
    good = state_dict(a=tensor())
    assert "compressed" in refusal(archive(model, good, zipfile.ZIP_DEFLATED))
    assert "byte order" in refusal(archive(model, good, byteorder=b"big"))
    with zipfile.ZipFile(model, "w") as file:
        file.writestr("archive/data/0", b"")
    assert "NAME/data.pkl" in refusal(model)
    with zipfile.ZipFile(model, "w") as file:
        file.writestr("archive/data.pkl", good)
        file.writestr("elsewhere/data/0", FLOATS.tobytes())
    assert "out of place" in refusal(model)
    archive(model, good)
    with zipfile.ZipFile(model, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data/0", FLOATS.tobytes())
    assert "twice" in refusal(model)
    model.write_bytes(b"<html>")
    assert "not a PyTorch weights file" in refusal(model)
    model.write_bytes(b"")
    assert "not a PyTorch weights file" in refusal(model)


def test_a_record_that_claims_more_than_the_file(model):
    raw = bytearray(archive(model, state_dict(a=tensor())).read_bytes())
    entry = raw.rindex(b"PK\x01\x02")  # the directory's entry of data/0
    raw[entry + 20 : entry + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    model.write_bytes(raw)
    assert "outside the file" in refusal(model)
    raw[entry + 42 : entry + 46] = struct.pack("<I", 0xFFFFFF00)  # and its local header beyond the end
    model.write_bytes(raw)
    refusal(model)


def test_old_torch_wrote_no_byteorder(model):
    with zipfile.ZipFile(model, "w") as file:
        file.writestr("archive/data.pkl", state_dict(a=tensor()))
        file.writestr("archive/data/0", FLOATS.tobytes())
    with open_weights(model) as weights:
        assert np.array_equal(weights.read("a"), FLOATS.reshape(2, 3))


def opened(path: Path) -> str:
    """Reads all there is; the message if it is refused."""
    try:
        with open_weights(path) as weights:
            for name in weights.names():
                assert weights.read(name).shape == weights.shape(name)
    except UserError as error:
        return str(error)
    return ""


@OWN_FOLDER
@given(
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    cut=st.just(0) | st.integers(0, 900),
)
def test_damaged_archives(tmp_path_factory, edits, cut):
    path = archive(
        tmp_path_factory.mktemp("damage") / "pytorch_model.bin", state_dict(a=tensor(), b=tensor((6,), (1,)))
    )
    raw = bytearray(path.read_bytes())
    for position, value in edits:
        raw[position % len(raw)] = value
    path.write_bytes(raw[: max(0, len(raw) - cut)])
    assert "\n" not in opened(path)


@OWN_FOLDER
@given(
    pieces=st.lists(
        st.sampled_from(
            [bytes([code]) for code in range(256)] + [tensor(), text("a"), named("os", "system"), b"}", b"(", b"u"]
        )
        | st.binary(max_size=6),
        max_size=20,
    )
)
def test_random_pickles(tmp_path_factory, pieces):
    path = archive(tmp_path_factory.mktemp("random") / "pytorch_model.bin", b"\x80\x02" + b"".join(pieces) + b".")
    assert "\n" not in opened(path)


# Against torch itself.
def test_same_as_torch(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24).reshape(4, 6)
    kinds = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
    ]
    state = {str(kind): base.to(kind) for kind in [*kinds, torch.uint8]}
    state |= {
        "bool": base % 2 == 0,
        "transposed": base.float().T,
        "slice": base.float()[1:3, 2:5],
        "steps": base.float()[::2, ::3],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "positions": torch.arange(7).expand((1, -1)),
    }
    state["shared"] = state["slice"]
    for protocol in (2, 4):
        torch.save(state, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
        with open_weights(tmp_path) as weights:
            assert set(weights.names()) == set(state)
            for name, expected in state.items():
                array = weights.read(name)
                assert str(array.dtype) == str(expected.dtype).removeprefix("torch.")
                as_numpy = expected.detach().double().numpy()
                assert np.array_equal(array.astype(np.float64), as_numpy)
                if expected.ndim:
                    assert np.array_equal(weights.read_rows(name, 0, 1).astype(np.float64), as_numpy[:1])


def test_a_real_state_dict_and_shards(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    state = layer.state_dict()
    assert state._metadata  # pickled with BUILD
    torch.save(state, tmp_path / "pytorch_model.bin")
    with open_weights(tmp_path) as weights:
        assert all(np.array_equal(weights.read(name), value.numpy()) for name, value in state.items())
    (tmp_path / "pytorch_model.bin").unlink()
    names = list(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file_name, members in shards.items():
        torch.save({name: state[name] for name in members}, tmp_path / file_name)
    listed = ", ".join(f'"{name}": "{file_name}"' for file_name, members in shards.items() for name in members)
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{{listed}}}}}')
    with open_weights(tmp_path) as weights:
        assert weights.format == "pytorch"
        assert all(np.array_equal(weights.read(name), value.numpy()) for name, value in state.items())


def test_what_torch_can_save_but_is_not_plain(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    for value, part in (
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": torch.zeros(2), "epoch": 3}, "'epoch' is not a tensor"),
        ({"model": {"a": torch.zeros(2)}}, "'model' is not a tensor"),
        ({"a": torch.zeros(2).expand(5, 2)}, "expanded"),
        ({"a": torch.zeros(0)}, "zero"),
        ({"a": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
    ):
        torch.save(value, path)
        assert part in refusal(path)
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    path.write_bytes(buffer.getvalue()[:-30])
    assert "zip directory" in refusal(path)


def test_a_flipped_bit_of_numbers_is_found_by_the_checksum(model):
    good = archive(model, state_dict(a=tensor(), b=tensor((6,), (1,)))).read_bytes()
    place = good.index(FLOATS.tobytes())
    for bit in (0, 95, 191):
        raw = bytearray(good)
        raw[place + bit // 8] ^= 1 << bit % 8
        model.write_bytes(raw)
        with open_weights(model) as weights:
            with pytest.raises(UserError, match=r"corrupt.*'b' do not match their checksum"):
                weights.read_rows("b", 5, 6)
            with pytest.raises(UserError, match="'a' do not match"):
                weights.read("a")
    raw = bytearray(good)
    raw[good.index(b"FloatStorage")] ^= 1
    model.write_bytes(raw)
    assert "data.pkl does not match its checksum" in refusal(model)


def test_files_without_checksums_are_read_as_they_are(tmp_path):
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(6.0)}, tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    with open_weights(tmp_path / "pytorch_model.bin") as weights:
        assert np.array_equal(weights.read("a"), FLOATS)
