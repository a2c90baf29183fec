"""Malformed weights: safetensors headers, PyTorch archives and pickles, msgpack, indexes of shards."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import msgpack
import numpy as np

from faults.malformed.case import MILLION, Case, Damage, bad_json, both, gone, no_files, put, words

CONVERT = words("convert model made")
SAFETENSORS, TORCH, FLAX = "model/model.safetensors", "model/pytorch_model.bin", "model/flax_model.msgpack"
Header = dict[str, object]


def cases() -> Iterator[Case]:
    """The cases of this kind."""
    for title, damage in (*bad_json(SAFETENSORS), *_headers()):
        yield Case("weights", f"safetensors: {title}", damage, CONVERT)
    yield Case("weights", "safetensors: predict of a cut file", _cut(SAFETENSORS, 700), words("predict model --text a"))
    yield Case("weights", "safetensors: no file", gone(SAFETENSORS), CONVERT)
    for title, damage in _archives():
        yield Case("weights", f"torch: {title}", both(gone(SAFETENSORS), damage), CONVERT)
    for title, raw in _packed().items():
        yield Case("weights", f"msgpack: {title}", both(gone(SAFETENSORS), put(FLAX, raw)), CONVERT)
    for title, damage in (*bad_json(f"{SAFETENSORS}.index.json"), *_indexes()):
        moved = both(lambda folder: (folder / SAFETENSORS).rename(folder / "model/a.safetensors"), damage)
        yield Case("weights", f"index: {title}", moved, CONVERT)


def _cut(name: str, size: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _longer(folder: Path) -> None:
    path = folder / SAFETENSORS
    path.write_bytes(path.read_bytes() + b"\0" * 9)


def _header(change: Callable[[Header], object]) -> Damage:
    """Another header before the same data."""

    def damage(folder: Path) -> None:
        raw = (folder / SAFETENSORS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header = change(header) or header
        said = json.dumps(header).encode()
        (folder / SAFETENSORS).write_bytes(len(said).to_bytes(8, "little") + said + raw[8 + length :])

    return damage


def _first(key: str, value: object) -> Damage:
    """Another value of a key of the first tensor."""

    def change(header: Header) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[name] = {**cast(Header, header[name]), key: value}

    return _header(change)


def _headers() -> Iterator[tuple[str, Damage]]:
    for title, length in {"0": 0, "far": 10**12, "2**63": 2**63, "2**64 - 1": 2**64 - 1}.items():
        yield f"a header of {title} bytes", put(SAFETENSORS, length.to_bytes(8, "little") + b"{}" * 100)
    deep = b"[" * 100_000
    yield "a deep header", put(SAFETENSORS, len(deep).to_bytes(8, "little") + deep)
    wrong: dict[str, tuple[object, ...]] = {
        "dtype": ("F31", 5, None, "O", ["F32"], MILLION),
        "shape": (None, 5, [-1], ["36", "16"], [36.0, 16], [0, 16], [2**62, 2**62], [2**70], [1] * 100_000, {}, [True]),
        "data_offsets": (None, [], [0], [0, 2**70], [-4, 0], ["0", "4"], [8, 4], [0, 4, 8], [0.0, 4.0]),
        "more": (1,),
    }
    for key, values in wrong.items():
        for value in values:
            yield f"{key}: {str(value)[:30]}", _first(key, value)
    yield "metadata of numbers", _header(lambda header: header.update({"__metadata__": {"a": 1}}))
    yield "no tensors", _header(lambda header: {"__metadata__": {}})
    yield "a tensor that is a list", _header(lambda header: header.update({"x": []}))
    yield "a name of a million characters", _header(lambda header: {MILLION: next(iter(header.values()))})
    yield "a name of control characters", _header(lambda header: {"\x1b[31m\x07\n": next(iter(header.values()))})
    yield "a name that is no Unicode", _header(lambda header: {"\ud800": next(iter(header.values()))})
    yield "names of another model", _header(lambda header: {f"other.{name}": value for name, value in header.items()})
    yield "bytes behind the data", _longer


def _tensor(shape: object = (2, 3), stride: object = (3, 1), offset: int = 0, key: str = "0", length: int = 6) -> bytes:
    """A tensor as torch pickles it."""
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu") + _plain(length) + b"tQ"
    rest = _plain(offset) + _plain(shape) + _plain(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _plain(value: object) -> bytes:
    """A plain value, without the protocol before it and the stop behind it."""
    return pickle.dumps(value, 2)[2:-1]


def _named(name: str, value: bytes) -> bytes:
    return b"\x80\x02}(" + _text(name) + value + b"u."


class _Canary:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return open, ("canary", "w")


def _archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Damage:
    def damage(folder: Path) -> None:
        stored = {"data.pkl": pickled, "byteorder": b"little", "data/0": np.arange(6, dtype=np.float32).tobytes()}
        with zipfile.ZipFile(folder / TORCH, "w", compression) as file:
            for name, raw in (stored | {name.replace("__", "/"): raw for name, raw in records.items()}).items():
                file.writestr(f"archive/{name}", raw)

    return damage


def _archives() -> Iterator[tuple[str, Damage]]:
    pickles = {
        "code": pickle.dumps(_Canary()),
        "code in a dict": pickle.dumps({"a": _Canary()}, 2),
        "eval": b"\x80\x02cbuiltins\neval\n(" + _text("open('canary', 'w')") + b"tR.",
        "os.system": b"\x80\x04" + _text("os") + _text("system") + b"\x93(" + _text("touch canary") + b"tR.",
        "INST": b"(" + _text("touch canary") + b"ios\nsystem\n.",
        "build": b"\x80\x02" + _tensor() + b"}b.",
        "empty": b"",
        "no stop": b"\x80\x02}",
        "empty stack": b"\x80\x02.",
        "a memo that is not there": b"\x80\x02h\x07.",
        "a number as a name": b"\x80\x02}(K\x01" + _tensor() + b"u.",
        "no dict": b"\x80\x02]" + _tensor() + b"a.",
        "a billion laughs": b"\x80\x02N" + b"\x85q\x00h\x00h\x00\x86" * 2000 + b".",
        "lists of lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "a text of 2**62 bytes": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
        "a frame of 2**62 bytes": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"}.",
        "a number of a million bytes": b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"\x01" * 10**6 + b".",
        "negative shape": _named("a", _tensor((-2, -3))),
        "no rows": _named("a", _tensor((0, 3))),
        "an expanded view": _named("a", _tensor((1 << 40,), (0,))),
        "beyond its storage": _named("a", _tensor((2, 4), (4, 1))),
        "an offset beyond": _named("a", _tensor(offset=10**9)),
        "a storage that is not there": _named("a", _tensor(key="7")),
        "a storage outside": _named("a", _tensor(key="../../x")),
        "a storage of other length": _named("a", _tensor(length=10**12)),
        "shape of text": _named("a", _tensor(("2", "3"))),
        "many dimensions": _named("a", _tensor((1,) * 1000, (1,) * 1000)),
        "a long name": _named(MILLION, _tensor()),
        "an odd name": _named("\x1b[31m\n", _tensor()),
        "another model": _named("a", _tensor()),
    }
    for title, raw in pickles.items():
        yield title, _archive(raw)
    good = _named("a", _tensor())
    yield "a compressed bomb", _archive(good + b"\0" * 10**8, zipfile.ZIP_DEFLATED)
    yield "no pickle", lambda folder: zipfile.ZipFile(folder / TORCH, "w").close()
    yield "big-endian", _archive(good, byteorder=b"big")
    yield "a cut archive", both(_archive(good), _cut(TORCH, 300))
    yield "a bare pickle of code", put(TORCH, pickle.dumps(_Canary()))
    yield "a legacy file of code", put(TORCH, pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(_Canary()))
    yield "a legacy file, cut off", put(TORCH, pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    yield "rubbish", put(TORCH, bytes(range(256)) * 100)
    yield "empty file", put(TORCH, b"")
    for title, damage in no_files(TORCH):
        yield title, damage


def _packed_once(tree: object) -> bytes:
    return cast(bytes, msgpack.packb(tree))


def _array(shape: object, dtype: object, raw: object) -> msgpack.ExtType:
    return msgpack.ExtType(1, _packed_once((shape, dtype, raw)))


def _packed() -> dict[str, bytes]:
    four = np.arange(4, dtype=np.float32).tobytes()
    trees: dict[str, object] = {
        "a list": [1, 2],
        "a number as a name": {1: _array([4], "float32", four)},
        "a leaf that is text": {"a": "text"},
        "too few bytes": {"a": _array([5], "float32", four)},
        "a huge shape": {"a": _array([2**40, 2**40], "float32", four)},
        "a negative shape": {"a": _array([-4], "float32", four)},
        "objects": {"a": _array([4], "object", four)},
        "a type that is no name": {"a": _array([4], 5, four)},
        "bytes that are text": {"a": _array([4], "float32", "text")},
        "an unknown extension": {"a": msgpack.ExtType(99, b"x")},
        "pieces that lie": {"a": {"__msgpack_chunked_array__": True, "shape": [10**12], "chunks": {}}},
        "another model": {"params": {"a": _array([4], "float32", four)}},
        "a long name": {MILLION: _array([4], "float32", four)},
        "an odd name": {"\x1b[31m\n": _array([4], "float32", four)},
    }
    deep: bytes = b"\x81\xa1a" * 100_000 + b"\xc0"
    return {title: _packed_once(tree) for title, tree in trees.items()} | {
        "empty": b"",
        "deep": deep,
        "a map of 2**32 items": b"\xdf\xff\xff\xff\xff",
        "a list of 2**32 items": b"\x81\xa1a\xdd\xff\xff\xff\xff",
        "bytes of 4 GB": b"\x81\xa1a\xc6\xff\xff\xff\xff",
        "rubbish": b"\xc1" * 1000,
        "a pickle": pickle.dumps(_Canary()),
        "more behind": _packed_once({"params": {"a": _array([4], "float32", four)}}) * 2,
    }


def _indexes() -> Iterator[tuple[str, Damage]]:
    maps: dict[str, object] = {
        "no map": ...,
        "map: a list": ["a"],
        "map: empty": {},
        "map: numbers": {"a": 1},
        "map: a file that is not there": {"a": "b.safetensors"},
        "map: a tensor that is not there": {"a": "a.safetensors"},
        "map: a folder above": {"a": "../base/model.safetensors"},
        "map: an absolute path": {"a": "/dev/zero"},
        "map: no name": {"a": ""},
        "map: NUL": {"a": "a\0"},
        "map: a long file name": {"a": MILLION},
        "map: a long tensor name": {MILLION: "a.safetensors"},
        "map: a file of another kind": {"a": "config.json"},
        "map: 5,000 files": {str(i): f"{i}.safetensors" for i in range(5000)},
    }
    for title, value in maps.items():
        yield title, put(f"{SAFETENSORS}.index.json", json.dumps({} if value is ... else {"weight_map": value}))
