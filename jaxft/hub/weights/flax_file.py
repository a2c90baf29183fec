"""``flax_model.msgpack``: the nested dict of arrays that ``flax.serialization.to_bytes`` writes.

Unlike the other formats this one has no directory: shapes and positions are known only after parsing everything. Opening
reads the whole file once, array by array, and keeps where each lies (peak: about three times the largest array). Names
are flax's, with "." between levels; :mod:`jaxft.hub.weights.flax_names` translates them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np

from jaxft.errors import UserError
from jaxft.hub.weights.contract import MAX_RANK, TensorSpec, Weights, check_name, check_shape, corrupt, quoted
from jaxft.hub.weights.dtypes import FLAX
from jaxft.hub.weights.pread import RandomAccessFile

FORMAT = "flax msgpack"
_NDARRAY, _COMPLEX, _NUMPY_SCALAR = 1, 2, 3  # msgpack extension types of flax.serialization
_CHUNKED = "__msgpack_chunked_array__"  # arrays past 2**30 bytes are stored in pieces
_MAX_KEYS = 1_000_000  # per dict
_MAX_DEPTH = 100


@dataclass(frozen=True)
class _Array:
    """An array in the file."""

    spec: TensorSpec
    places: tuple[int, ...]
    """Which extension objects hold its elements, counted from the start of the file."""
    value: np.ndarray | None = None
    """Value of one of Python's complex numbers, which are not stored as elements."""


class FlaxFile(Weights):
    """One flax msgpack file, open."""

    def __init__(self, path: Path) -> None:
        self._file = RandomAccessFile(path)
        try:
            self._arrays: dict[str, _Array] = {}
            sizes: list[int] = []
            _flatten(_unpack(path, sizes), "", self._arrays, path)
            # Elements are the last thing in an extension object.
            self._starts = [end - size for end, size in zip(_extension_ends(self._file), sizes, strict=True)]
            self._sizes = sizes
            super().__init__(path, FORMAT, {name: array.spec for name, array in self._arrays.items()})
        except BaseException:
            self._file.close()
            raise

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        array = self._arrays[name]
        if array.value is not None:
            np.copyto(out, array.value, casting="no")
        skipped = 0 if rows is None else rows[0] * (out.nbytes // (rows[1] - rows[0]))
        rest = out.reshape(-1).view(np.uint8)
        for place in array.places:
            count = max(0, min(self._sizes[place] - skipped, rest.size))
            self._file.read_at(self._starts[place] + skipped, rest[:count])
            rest, skipped = rest[count:], max(0, skipped - self._sizes[place])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _unpack(path: Path, sizes: list[int]) -> object:
    """The one object in the file; only dicts with text keys and our three extension types can come out of it.

    Args:
      path: the file.
      sizes: gets the bytes of elements of each extension object, in the order of the file.
    """
    try:
        with open(path, "rb") as file:
            unpacker = msgpack.Unpacker(
                file,
                max_buffer_size=max(path.stat().st_size, 1),
                max_array_len=MAX_RANK,
                max_map_len=_MAX_KEYS,
                ext_hook=functools.partial(_array_of_extension, path, sizes),
                object_pairs_hook=functools.partial(_dict_of_pairs, path),
            )
            value = unpacker.unpack()
            if unpacker.tell() != path.stat().st_size:
                raise corrupt(path, "something follows the parameters")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (msgpack.exceptions.UnpackException, ValueError, RecursionError):
        raise corrupt(path, "it is not valid msgpack") from None
    if not isinstance(value, dict):
        raise corrupt(path, "it holds no dict of parameters")
    return value


def _dict_of_pairs(path: Path, pairs: list[tuple[object, object]]) -> object:
    result: dict[str, object] = {}
    for key, value in pairs:
        name = check_name(key, path)
        if name in result:
            raise corrupt(path, f"the key {quoted(name)} appears twice")
        result[name] = value
    return _joined(result, path) if _CHUNKED in result else result


def _array_of_extension(path: Path, sizes: list[int], code: int, payload: bytes) -> _Array:
    place = len(sizes)
    sizes.append(0)
    if code == _COMPLEX:
        parts = _unpack_payload(payload, path)
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, float) for part in parts):
            raise corrupt(path, "a complex number is not a pair")
        value = np.asarray(complex(*parts))
        return _Array(TensorSpec((), value.dtype), (), value)
    if code not in (_NDARRAY, _NUMPY_SCALAR):
        raise corrupt(path, f"msgpack extension type {code} is not one that flax writes")
    fields = _unpack_payload(payload, path)
    if not isinstance(fields, list) or len(fields) != 3:
        raise corrupt(path, "an array is not (shape, dtype, bytes)")
    shape = check_shape(fields[0], "(name not known yet)", path)
    if not isinstance(fields[1], str) or fields[1] not in FLAX:
        shown = quoted(fields[1]) if isinstance(fields[1], str) else "that is not text"
        raise UserError(f"{path}: an array has dtype {shown}, which jaxft does not read")
    spec = TensorSpec(shape, FLAX[fields[1]])
    if not isinstance(fields[2], bytes) or len(fields[2]) != spec.nbytes:
        raise corrupt(path, f"an array of shape {shape} does not have the bytes that it needs")
    sizes[place] = spec.nbytes
    return _Array(spec, (place,))


def _unpack_payload(payload: bytes, path: Path) -> object:
    def refuse(code: int, data: bytes) -> None:
        raise corrupt(path, "an array contains another extension type")

    return msgpack.unpackb(payload, ext_hook=refuse, max_array_len=MAX_RANK, max_map_len=0)


def _joined(stored: dict[str, object], path: Path) -> _Array:
    """An array that was stored in pieces: flat chunks "0", "1", ... and its shape as a dict "0", "1", ..."""
    if set(stored) != {_CHUNKED, "shape", "chunks"} or stored[_CHUNKED] is not True:
        raise corrupt(path, "a chunked array is not (shape, chunks)")
    shape = check_shape(_listed(stored["shape"], path), "(chunked)", path)
    chunks = _listed(stored["chunks"], path)
    flat = [chunk for chunk in chunks if isinstance(chunk, _Array) and len(chunk.spec.shape) == 1]
    if not chunks or len(flat) != len(chunks):
        raise corrupt(path, "a chunked array has no chunks, or chunks that are not flat arrays")
    if len({chunk.spec.dtype for chunk in flat}) != 1 or sum(c.spec.shape[0] for c in flat) != math.prod(shape):
        raise corrupt(path, "the chunks of an array do not make up its shape")
    return _Array(TensorSpec(shape, flat[0].spec.dtype), tuple(place for chunk in flat for place in chunk.places))


def _listed(numbered: object, path: Path) -> list[object]:
    if not isinstance(numbered, dict) or set(numbered) != {str(i) for i in range(len(numbered))}:
        raise corrupt(path, "a chunked array is not numbered from 0 on")
    return [numbered[str(i)] for i in range(len(numbered))]


def _flatten(tree: object, prefix: str, into: dict[str, _Array], path: Path, depth: int = 0) -> None:
    """Collects the arrays under their dotted names."""
    if depth > _MAX_DEPTH:
        raise corrupt(path, f"its parameters are nested more than {_MAX_DEPTH} levels deep")
    if isinstance(tree, _Array):
        if prefix in into:
            raise corrupt(path, f"two arrays have the name {quoted(prefix)}")
        into[prefix] = tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            _flatten(value, f"{prefix}.{key}" if prefix else key, into, path, depth + 1)
    else:
        raise UserError(f"{path}: the entry {quoted(prefix)} is not an array; save only the parameters")


# msgpack's type bytes (https://github.com/msgpack/msgpack/blob/master/spec.md): (bytes of the length field, further bytes).
_COUNTED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}  # bytes, text
_COUNTED |= {0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}  # extension objects: the code follows the length
_FIXED_EXTENSION = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}  # numbers
_FIXED |= {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}  # headers of arrays and dicts, whose members follow


def _extension_ends(file: RandomAccessFile) -> list[int]:
    """Where each extension object of a well-formed file ends."""
    position, ends = 0, []
    while position < file.size:
        head = file.bytes_at(position, min(6, file.size - position))
        kind = head[0]
        if kind in _COUNTED:
            width, more = _COUNTED[kind]
            position += 1 + width + more + int.from_bytes(head[1 : 1 + width], "big")
        elif kind in _FIXED_EXTENSION:
            position += 2 + _FIXED_EXTENSION[kind]
        elif 0xA0 <= kind <= 0xBF:
            position += 1 + (kind & 0x1F)  # short text
        else:
            position += 1 + _FIXED.get(kind, 0)
        if 0xC7 <= kind <= 0xC9 or kind in _FIXED_EXTENSION:
            ends.append(position)
    return ends
