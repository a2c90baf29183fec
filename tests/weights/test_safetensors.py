"""safetensors, indexes and the writer: against the reference implementation, and against damage."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.hub.weights import TensorOut, open_weights, write_safetensors
from jaxft.hub.weights.dtypes import SAFETENSORS

OWN_FOLDER = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=12).filter(lambda n: n != "__metadata__")


def array_of(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """Random bits (NaN and infinity included), except for booleans."""
    raw = np.random.default_rng(seed).integers(0, 256, max(1, int(np.prod(shape))) * dtype.itemsize, np.uint8)
    return ((raw & 1) if dtype == np.bool_ else raw).view(dtype).reshape(shape)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def outs(arrays: dict[str, np.ndarray]) -> list[TensorOut]:
    return [TensorOut(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]


def raw_file(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path: Path, part: str) -> None:
    with pytest.raises(UserError) as caught:
        open_weights(path)
    message = str(caught.value)
    assert part in message
    assert "\n" not in message
    assert str(path) in message


@OWN_FOLDER
@given(
    specs=st.dictionaries(
        NAMES, st.tuples(SHAPES, st.sampled_from(sorted(SAFETENSORS)), st.integers(0, 99)), min_size=1, max_size=6
    ),
    shard_bytes=st.sampled_from([1, 40, 10**9]),
)
def test_round_trip(tmp_path_factory, specs, shard_bytes):
    folder = tmp_path_factory.mktemp("round")
    arrays = {name: array_of(shape, SAFETENSORS[dtype], seed) for name, (shape, dtype, seed) in specs.items()}
    write_safetensors(folder, outs(arrays), shard_bytes)
    with open_weights(folder) as weights:
        assert weights.format == "safetensors"
        assert sorted(weights.names()) == sorted(arrays)
        for name, array in arrays.items():
            assert weights.shape(name) == array.shape
            assert weights.dtype(name) == array.dtype
            assert same_bits(weights.read(name), array)
            out = np.zeros_like(array)
            weights.read_into(name, out)
            assert same_bits(out, array)
            if array.shape:
                rows = array.shape[0]
                assert same_bits(weights.read_rows(name, rows // 2, rows), array[rows // 2 :])


def test_same_as_the_reference_both_ways(tmp_path):
    numpy_loader = pytest.importorskip("safetensors.numpy")
    arrays = {
        "b": np.arange(6, dtype=np.int8).reshape(2, 3),
        "a": np.array([[1.5]], np.float32),
        "s": np.array(3.0, np.float16),
    }
    (path,) = write_safetensors(tmp_path / "ours", outs(arrays))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    theirs = numpy_loader.load_file(path)
    assert all(same_bits(theirs[name], array) for name, array in arrays.items())

    numpy_loader.save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_weights(tmp_path) as weights:
        assert all(same_bits(weights.read(name), array) for name, array in arrays.items())


def test_torch_and_transformers_read_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    load_file = pytest.importorskip("safetensors.torch").load_file
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    bfloat16 = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items() if array.dtype == np.float32}
    (path,) = write_safetensors(tmp_path / "bf16", outs(bfloat16))
    for name, tensor in load_file(path).items():
        assert tensor.dtype == torch.bfloat16
        assert np.array_equal(tensor.float().numpy(), bfloat16[name].astype(np.float32))

    folder = tmp_path / "sharded"
    paths = write_safetensors(folder, outs(state), shard_bytes=1500)
    assert len(paths) > 3
    config.save_pretrained(folder)
    again = transformers.BertModel.from_pretrained(folder).state_dict()
    assert all(np.array_equal(again[name].numpy(), array) for name, array in state.items())

    model.save_pretrained(tmp_path / "theirs", max_shard_size="2KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    with open_weights(tmp_path / "theirs") as weights:
        assert sorted(weights.names()) == sorted(state)
        assert all(same_bits(weights.read(name), array) for name, array in state.items())


def test_shard_layout(tmp_path):
    arrays = {name: np.zeros(size, np.uint8) for name, size in (("a", 4), ("b", 4), ("big", 50), ("c", 8), ("d", 1))}
    paths = write_safetensors(tmp_path, outs(arrays), shard_bytes=8)
    index = json.loads(paths[-1].read_text())
    assert index["metadata"] == {"total_size": 67}
    assert {n: int(f[6:11]) for n, f in index["weight_map"].items()} == {"a": 1, "b": 1, "big": 2, "c": 3, "d": 4}
    assert paths[0].name == "model-00001-of-00004.safetensors"
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)


def test_many_threads_read_what_one_does(tmp_path):
    arrays = {f"t{i}": array_of((64, 33), np.dtype(np.float32), i) for i in range(40)}
    write_safetensors(tmp_path, outs(arrays), shard_bytes=100_000)
    with open_weights(tmp_path) as weights, ThreadPoolExecutor(8) as pool:
        for name, array in zip(weights.names(), pool.map(weights.read, weights.names()), strict=True):
            assert same_bits(array, arrays[name])


GOOD = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}
BROKEN = {
    "no header": (b"", b"", "not valid JSON"),
    "hole": ({"a": entry([2], 0, 8), "b": entry([1], 9, 13)}, bytes(13), "begins at byte 9"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8), "begins at byte 4"),
    "late start": ({"a": entry([2], 4, 12)}, bytes(12), "begins at byte 4"),
    "truncated": (GOOD, bytes(11), "ends at byte 12"),
    "trailing": (GOOD, bytes(13), "belong to nothing"),
    "unknown dtype": ({"a": entry([2], 0, 8, "F4")}, bytes(8), "'F4'"),
    "dtype not text": ({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "not text"),
    "size": ({"a": entry([3], 0, 8)}, bytes(8), "its shape needs 12"),
    "zero": ({"a": entry([0], 0, 0)}, b"", "increasing"),
    "absurd zero": ({"a": entry([1 << 60, 0], 0, 4)}, bytes(4), "zero"),
    "absurd": ({"a": entry([1 << 61, 1 << 61], 0, 4)}, bytes(4), "shape needs"),
    "negative": ({"a": entry([-1, -1], 0, 4)}, bytes(4), "negative"),
    "negative offset": ({"a": entry([1], -4, 0)}, b"", "increasing"),
    "rank": ({"a": entry([1] * 9, 0, 4)}, bytes(4), "9 dimensions"),
    "bool size": ({"a": entry([True], 0, 4)}, bytes(4), "integers"),
    "float offset": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4]}}, bytes(4), "two integers"),
    "extra key": ({"a": {**entry([1], 0, 4), "x": 1}}, bytes(4), "exactly"),
    "entry not a map": ({"a": 3}, bytes(4), "exactly"),
    "empty": ({}, b"", "no tensors"),
    "metadata": ({"__metadata__": {"a": 1}, **GOOD}, bytes(12), "__metadata__"),
    "duplicate": (b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4), "appears twice"),
    "surrogate": (b'{"\\ud800":%b}' % json.dumps(entry([1], 0, 4)).encode(), bytes(4), "Unicode"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "deep": (b"[" * 100_000, b"", "not valid JSON"),
    "digits": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "list": (b"[]", b"", "not a JSON object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_structure_is_one_clear_line(tmp_path, case):
    header, data, part = BROKEN[case]
    refused(raw_file(tmp_path / "model.safetensors", header, data), part)


def test_header_length_lies(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refused(path, "limit")
    path.write_bytes((3).to_bytes(8, "little") + b"{}")
    refused(path, "claims 3 bytes")
    path.write_bytes(b"\x01\x02")
    refused(path, "too few")


def test_odd_names_and_values_are_fine(tmp_path):
    arrays = {
        "": np.array([np.nan], np.float32),
        "a\nb": np.array([np.inf], np.float32),
        "../x": np.array([1.0], np.float32),
        "é": np.array([2.0], np.float32),
    }
    write_safetensors(tmp_path, outs(arrays))
    with open_weights(tmp_path) as weights:
        assert all(same_bits(weights.read(name), array) for name, array in arrays.items())
        with pytest.raises(UserError, match="did you mean") as caught:
            weights.read("../y")
        assert "\n" not in str(caught.value)


def test_boolean_bytes_are_checked(tmp_path):
    with open_weights(raw_file(tmp_path / "m.safetensors", {"a": entry([2], 0, 2, "BOOL")}, b"\x01\x07")) as weights:
        assert weights.read_rows("a", 0, 1).all()
        with pytest.raises(UserError, match="boolean"):
            weights.read("a")


def test_file_that_shrinks_after_opening(tmp_path):
    path = raw_file(tmp_path / "m.safetensors", GOOD, bytes(12))
    with open_weights(path) as weights:
        os.truncate(path, path.stat().st_size - 4)
        assert weights.read("a").shape == (2,)
        with pytest.raises(UserError, match="truncated"):
            weights.read("b")


def test_misuse_is_a_bug_not_a_user_error(tmp_path):
    weights = open_weights(raw_file(tmp_path / "m.safetensors", {"a": entry([4, 2], 0, 32)}, bytes(32)))
    for out in (np.empty((2, 4), "f4"), np.empty((4, 2), "f8"), np.empty((2, 4), "f4").T):
        with pytest.raises(ValueError, match="read_into"):
            weights.read_into("a", out)
    for start, stop in ((0, 5), (2, 2), (-1, 2), (3, 1)):
        with pytest.raises(ValueError, match="read_rows"):
            weights.read_rows("a", start, stop)
    weights.close()
    weights.close()
    with pytest.raises(ValueError, match="closed"):
        weights.read("a")


@OWN_FOLDER
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 400) | st.just(0),
)
def test_damage_never_gives_anything_but_a_user_error(tmp_path_factory, edits, cut):
    folder = tmp_path_factory.mktemp("damage")
    arrays = {
        "weight": np.ones((3, 4), np.float32),
        "bias": np.ones(4, ml_dtypes.bfloat16),
        "flag": np.ones(2, np.bool_),
    }
    (path,) = write_safetensors(folder, outs(arrays))
    raw = bytearray(path.read_bytes())
    for position, value in edits:
        raw[position % len(raw)] = value
    path.write_bytes(raw[: max(0, len(raw) - cut)])
    try:
        with open_weights(path) as weights:
            for name in weights.names():
                array = weights.read(name)
                assert array.shape == weights.shape(name)
                assert array.dtype == weights.dtype(name)
        message = ""
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def two_shards(folder: Path) -> dict[str, object]:
    write_safetensors(folder, outs({"a": np.zeros(4, np.uint8), "b": np.zeros(4, np.uint8)}), shard_bytes=4)
    return json.loads((folder / "model.safetensors.index.json").read_text())


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": FIRST, "b": "other.safetensors"}, "missing"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, "not there"),
        ({"a": FIRST, "b": FIRST}, "not there"),
        ({"a": FIRST}, "not there"),
        ({"a": "../x.safetensors"}, "plain file name"),
        ({"a": "/etc/passwd"}, "plain file name"),
        ({"a": ".."}, "plain file name"),
        ({"a": "x\nmodel.safetensors"}, "plain file name"),
        ({"a": 3}, "not text"),
        ({}, "weight_map"),
        (["a"], "weight_map"),
    ],
)
def test_bad_indexes(tmp_path, weight_map, part):
    two_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    if weight_map == {"a": FIRST}:  # a shard with more than the index says
        (tmp_path / FIRST).unlink()
        (tmp_path / SECOND).rename(tmp_path / FIRST)
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(index, part)


def test_tensor_in_two_shards_or_unlisted(tmp_path):
    two_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    raw_file(tmp_path / SECOND, {"a": entry([1], 0, 4), "b": entry([1], 4, 8)}, bytes(8))
    refused(index, "two shards")
    raw_file(tmp_path / SECOND, {"c": entry([1], 0, 4), "b": entry([1], 4, 8)}, bytes(8))
    refused(index, "does not list")
    index.write_text(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}')
    refused(index, "twice")
    index.write_text("{")
    refused(index, "not valid JSON")


def test_finding(tmp_path):
    refused(tmp_path, "pytorch_model.bin.index.json")
    refused(tmp_path / "nothing", "does not exist")
    (tmp_path / "model.h5").write_bytes(b"x")
    refused(tmp_path / "model.h5", "must end in one of .safetensors")
    write_safetensors(tmp_path, outs({"a": np.zeros(4, np.uint8)}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    with open_weights(tmp_path) as weights:
        assert weights.path == tmp_path / "model.safetensors"
    # A dangling link is an error, not a reason to look for something else.
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="missing"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="regular file"):
        open_weights(tmp_path)


def test_no_file_descriptor_is_left_open(tmp_path):
    two_shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with open_weights(tmp_path):
        assert len(os.listdir("/proc/self/fd")) == before + 2
    (tmp_path / SECOND).write_bytes(b"broken")
    for _ in range(3):
        with pytest.raises(UserError):
            open_weights(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_writer_refuses_and_leaves_nothing(tmp_path):
    zeros = np.zeros(4, np.float32)
    bad = {
        "announced": TensorOut("a", (4,), np.dtype(np.float64), lambda: zeros),
        "zero dimension": TensorOut("a", (0,), np.dtype(np.float32), lambda: zeros),
        "no dtype": TensorOut("a", (4,), np.dtype(np.complex128), lambda: zeros),
        "reserved": TensorOut("__metadata__", (4,), np.dtype(np.float32), lambda: zeros),
    }
    for part, tensor in bad.items():
        with pytest.raises(ValueError, match=part):
            write_safetensors(tmp_path, [tensor])
    with pytest.raises(ValueError, match="same name"):
        write_safetensors(tmp_path, outs({"a": zeros}) * 2)
    with pytest.raises(ValueError, match="no tensors"):
        write_safetensors(tmp_path, [])
    assert os.listdir(tmp_path) == []
    two_shards(tmp_path)
    with pytest.raises(UserError, match="already exists"):
        write_safetensors(tmp_path, outs({"a": zeros}))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        write_safetensors(tmp_path / "file", outs({"a": zeros}))


def test_writer_makes_one_tensor_at_a_time(tmp_path):
    alive = most = 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def make():
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return np.ones((16,), np.float32)[()].view(Counted)

    tensors = [TensorOut(f"t{i}", (16,), np.dtype(np.float32), make) for i in range(5)]
    write_safetensors(tmp_path, tensors)
    assert most == 1
