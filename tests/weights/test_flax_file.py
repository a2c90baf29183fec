"""flax_model.msgpack, and Flax checkpoints under PyTorch names."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.hub.weights import open_weights
from jaxft.hub.weights.flax_names import under_pytorch_names

OWN_FOLDER = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
KINDS = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int32, np.int8, np.uint8, np.bool_, np.complex64]
ARRAYS = st.builds(
    lambda shape, kind: np.arange(int(np.prod(shape))).reshape(shape).astype(kind),
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    st.sampled_from(KINDS),
)
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1, max_size=6)
TREES = st.recursive(ARRAYS, lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=8)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def saved(folder: Path, tree: object) -> Path:
    path = folder / "flax_model.msgpack"
    path.write_bytes(tree if isinstance(tree, bytes) else serialization.to_bytes(tree))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        under_pytorch_names(open_weights(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@OWN_FOLDER
@given(tree=st.dictionaries(KEYS, TREES, min_size=1, max_size=3))
def test_same_as_flax_wrote(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("flax")
    saved(folder, tree)
    expected = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep=".").items()}
    with open_weights(folder) as weights:
        assert weights.format == "flax msgpack"
        assert set(weights.names()) == set(expected)
        for name, array in expected.items():
            assert same(weights.read(name), array)
            if array.ndim:
                assert same(weights.read_rows(name, 0, 1), array[:1])


def test_chunked_arrays_and_scalars(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    tree = {"big": {"w": np.arange(15, dtype=np.float32).reshape(3, 5)}, "n": np.float32(2.5), "c": complex(1, 2)}
    path = saved(tmp_path, tree)
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    with open_weights(path) as weights:
        assert same(weights.read("big.w"), tree["big"]["w"])
        assert same(weights.read("n"), np.array(2.5, np.float32))
        assert weights.read("c") == complex(1, 2)


def test_what_is_read_is_the_readers_own(tmp_path):
    path = saved(tmp_path, {"a": np.ones(3, np.float32)})
    with open_weights(path) as weights:
        weights.read("a")[:] = 7
        assert same(weights.read("a"), np.ones(3, np.float32))
    with pytest.raises(ValueError, match="closed"):
        weights.read("a")


def packed(value: object) -> bytes:
    raw = msgpack.packb(value)
    assert isinstance(raw, bytes)
    return raw


def array(shape: object, dtype: object, raw: object, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, packed((shape, dtype, raw)))


GOOD = array((1,), "float32", bytes(4))
CHUNKED = "__msgpack_chunked_array__"
BAD = {
    "not a dict": ([1], "no dict"),
    "number": ({"a": 3}, "not an array"),
    "none": ({"a": None}, "not an array"),
    "list": ({"a": [GOOD]}, "not an array"),
    "empty": ({}, "no tensors"),
    "empty dict inside": ({"a": {}}, "no tensors"),
    "number as key": ({1: GOOD}, "not valid msgpack"),
    "bytes as key": ({b"a": GOOD}, "type bytes"),
    "deeper than any model": (b"\x81\xa1a" * 200 + packed(GOOD), "levels deep"),
    "same name": ({"a": {"b": GOOD}, "a.b": GOOD}, "two arrays"),
    "unknown extension": ({"a": msgpack.ExtType(5, b"")}, "type 5"),
    "extension inside": ({"a": array((1,), "float32", GOOD)}, "another extension"),
    "dtype": ({"a": array((1,), "object", bytes(8))}, "'object'"),
    "dtype is bytes": ({"a": array((1,), b"float32", bytes(4))}, "not text"),
    "big-endian": ({"a": array((1,), ">f4", bytes(4))}, "'>f4'"),
    "too few bytes": ({"a": array((2,), "float32", bytes(4))}, "bytes that it needs"),
    "bytes are text": ({"a": array((1,), "float32", "abcd")}, "bytes that it needs"),
    "negative": ({"a": array((-1, -1), "float32", bytes(4))}, "negative"),
    "zero": ({"a": array((0,), "float32", b"")}, "zero"),
    "absurd": ({"a": array((1 << 61, 1 << 61), "float32", b"")}, "bytes that it needs"),
    "shape": ({"a": array("ab", "float32", bytes(8))}, "list of integers"),
    "fields": ({"a": msgpack.ExtType(1, packed([1, 2]))}, "shape, dtype, bytes"),
    "complex": ({"a": msgpack.ExtType(2, packed([1.0]))}, "pair"),
    "chunks missing": ({"a": {CHUNKED: True, "shape": {"0": 1}}}, "chunked"),
    "chunks false": ({"a": {CHUNKED: False, "shape": {"0": 1}, "chunks": {"0": GOOD}}}, "chunked"),
    "chunks numbered": ({"a": {CHUNKED: True, "shape": {"0": 1}, "chunks": {"1": GOOD}}}, "numbered"),
    "chunks short": ({"a": {CHUNKED: True, "shape": {"0": 2}, "chunks": {"0": GOOD}}}, "make up"),
    "chunks none": ({"a": {CHUNKED: True, "shape": {"0": 1}, "chunks": {}}}, "no chunks"),
    "chunks of dicts": ({"a": {CHUNKED: True, "shape": {"0": 1}, "chunks": {"0": {}}}}, "flat arrays"),
    "trailing": (packed({"a": GOOD}) + b"\x01", "follows"),
    "duplicate": (b"\x82" + (packed("a") + packed(GOOD)) * 2, "twice"),
    "truncated": (packed({"a": GOOD})[:-1], "not valid msgpack"),
    "no bytes": (b"", "not valid msgpack"),
    "deep": (b"\x81\xa1a" * 100_000, "not valid msgpack"),
    "map that claims much": (b"\xdf\xff\xff\xff\xff", "not valid msgpack"),
    "array that claims much": (b"\xdd\xff\xff\xff\xff", "not valid msgpack"),
    "text that is not": (b"\x81\xa1\xff\x01", "not valid msgpack"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    content, part = BAD[case]
    path = saved(tmp_path, content if isinstance(content, bytes) else packed(content))
    assert part in refusal(path)


@OWN_FOLDER
@given(
    edits=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=4), cut=st.just(0) | st.integers(0, 99)
)
def test_damaged_files(tmp_path_factory, edits, cut):
    folder = tmp_path_factory.mktemp("damage")
    path = saved(folder, {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.ones(2, np.bool_)})
    raw = bytearray(path.read_bytes())
    for position, value in edits:
        raw[position % len(raw)] = value
    path.write_bytes(raw[: max(0, len(raw) - cut)])
    message = ""
    try:
        with open_weights(path) as weights:
            for name in weights.names():
                assert weights.read(name).shape == weights.shape(name)
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_shards(tmp_path):
    tree = {"bert": {"x": {"kernel": np.ones((2, 3), np.float32)}, "y": {"bias": np.zeros(3, np.float32)}}}
    flat = traverse_util.flatten_dict(tree, sep="/")
    weight_map = {}
    for number, (name, value) in enumerate(flat.items(), 1):
        file_name = f"flax_model-{number:05d}-of-00002.msgpack"
        (tmp_path / file_name).write_bytes(serialization.to_bytes(traverse_util.unflatten_dict({name: value}, sep="/")))
        weight_map[name] = file_name
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with under_pytorch_names(open_weights(tmp_path)) as weights:
        assert {name: weights.shape(name) for name in weights.names()} == {"bert.x.weight": (3, 2), "bert.y.bias": (3,)}


def flax_bert() -> dict[str, np.ndarray]:
    """The parameter names of FlaxBertForPreTraining with a classifier beside it, all of different content."""
    norm = {"LayerNorm.scale": (4,), "LayerNorm.bias": (4,)}
    dense = {"dense.kernel": (4, 4), "dense.bias": (4,)}
    shapes = {
        **{f"bert.embeddings.{kind}_embeddings.embedding": (5, 4) for kind in ("word", "position", "token_type")},
        **{f"bert.embeddings.{name}": shape for name, shape in norm.items()},
        **{f"bert.encoder.layer.0.attention.self.{p}.kernel": (4, 4) for p in ("query", "key", "value")},
        **{f"bert.encoder.layer.0.attention.self.{p}.bias": (4,) for p in ("query", "key", "value")},
        **{f"bert.encoder.layer.0.attention.output.{name}": shape for name, shape in (norm | dense).items()},
        "bert.encoder.layer.0.intermediate.dense.kernel": (4, 6),
        "bert.encoder.layer.0.intermediate.dense.bias": (6,),
        **{f"bert.encoder.layer.0.output.{name}": shape for name, shape in norm.items()},
        "bert.encoder.layer.0.output.dense.kernel": (6, 4),
        "bert.encoder.layer.0.output.dense.bias": (4,),
        **{f"bert.pooler.{name}": shape for name, shape in dense.items()},
        **{f"cls.predictions.transform.{name}": shape for name, shape in (norm | dense).items()},
        "cls.predictions.bias": (5,),
        "cls.predictions.decoder.kernel": (4, 5),
        "cls.seq_relationship.kernel": (4, 2),
        "cls.seq_relationship.bias": (2,),
        "classifier.kernel": (4, 3),
        "classifier.bias": (3,),
    }
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("collection", ["", "params."])
def test_flax_bert_under_pytorch_names(tmp_path, collection):
    flat = flax_bert()
    saved(tmp_path, traverse_util.unflatten_dict({collection + name: a for name, a in flat.items()}, sep="."))
    with under_pytorch_names(open_weights(tmp_path)) as weights:
        names = weights.names()
        assert len(names) == len(flat)
        assert not [name for name in names if name.endswith(("kernel", "scale", "embedding")) or "params" in name]
        for ours, flax in (
            ("bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.0.intermediate.dense.kernel"),
            ("bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.attention.self.query.kernel"),
            ("cls.predictions.decoder.weight", "cls.predictions.decoder.kernel"),
            ("classifier.weight", "classifier.kernel"),
        ):
            assert same(weights.read(ours), flat[flax].T)
            assert same(weights.read_rows(ours, 1, 3), flat[flax].T[1:3])
            assert weights.shape(ours) == flat[flax].T.shape
        for ours, flax in (
            ("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.embedding"),
            ("bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.scale"),
            ("cls.predictions.bias", "cls.predictions.bias"),
        ):
            assert same(weights.read(ours), flat[flax])


def test_flax_bert_names_are_those_of_pytorch(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=5,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=6,
        max_position_embeddings=5,
        type_vocab_size=5,
    )
    theirs = {name: tuple(p.shape) for name, p in transformers.BertForPreTraining(config).named_parameters()}
    theirs |= {"cls.predictions.decoder.weight": (5, 4), "classifier.weight": (3, 4), "classifier.bias": (3,)}
    saved(tmp_path, traverse_util.unflatten_dict(flax_bert(), sep="."))
    with under_pytorch_names(open_weights(tmp_path)) as weights:
        assert {name: weights.shape(name) for name in weights.names()} == theirs


def test_conv_kernels_and_refusals(tmp_path):
    kernel = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)  # H W in out
    with under_pytorch_names(open_weights(saved(tmp_path, {"conv": {"kernel": kernel}}))) as weights:
        assert weights.shape("conv.weight") == (5, 4, 2, 3)
        assert weights.read("conv.weight")[4, 3, 1, 2] == kernel[1, 2, 3, 4]
        with pytest.raises(ValueError, match="closed"):
            weights.close() or weights.read("conv.weight")
    one = np.ones((1, 1, 1), np.float32)
    assert "3 dimensions" in refusal(saved(tmp_path, {"conv": {"kernel": one}}))
    assert "would both" in refusal(saved(tmp_path, {"a": {"scale": one, "weight": one}}))
    assert "beside params" in refusal(saved(tmp_path, {"params": {"a": one}, "batch_stats": {"a": one}}))


def test_only_flax_files_are_renamed(tmp_path):
    from jaxft.hub.weights import TensorOut, write_safetensors

    ones = np.ones(2, np.float32)
    write_safetensors(tmp_path, [TensorOut("scale", (2,), ones.dtype, lambda: ones)])
    with open_weights(tmp_path) as weights, pytest.raises(ValueError, match="already"):
        under_pytorch_names(weights)
