"""``flax_model.msgpack``: the nested dict of arrays that ``flax.serialization.to_bytes`` writes.

Unlike the other formats this one has no directory: shapes and positions are known only after parsing everything, so
opening reads the whole file into memory, array by array (peak: the file's size plus about three times its largest
array). Names are flax's, with "." between levels; :mod:`jaxft.weights.flax_names` translates them.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import msgpack
import numpy as np

from jaxft.errors import UserError
from jaxft.weights.contract import MAX_RANK, TensorSpec, Weights, check_name, check_shape, corrupt, quoted
from jaxft.weights.dtypes import FLAX

FORMAT = "flax msgpack"
_NDARRAY, _COMPLEX, _NUMPY_SCALAR = 1, 2, 3  # msgpack extension types of flax.serialization
_CHUNKED = "__msgpack_chunked_array__"  # arrays past 2**30 bytes are stored in pieces
_MAX_KEYS = 1_000_000  # per dict
_MAX_DEPTH = 100


class FlaxFile(Weights):
    """One flax msgpack file, in memory."""

    def __init__(self, path: Path) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        _flatten(_unpack(path), "", self._arrays, path)
        specs = {name: TensorSpec(array.shape, array.dtype) for name, array in self._arrays.items()}
        super().__init__(path, FORMAT, specs)

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        if name not in self._arrays:
            raise ValueError(f"{self.path} is closed")
        array = self._arrays[name]
        np.copyto(out, array if rows is None else array[rows[0] : rows[1]], casting="no")

    def close(self) -> None:
        """Lets the memory go."""
        self._arrays.clear()


def _unpack(path: Path) -> object:
    """The one object in the file; only dicts with text keys and our three extension types can come out of it."""
    if not path.is_file():
        raise UserError(f"{path} is missing or is not a regular file; name a weights file or a folder that has one")
    try:
        with open(path, "rb") as file:
            unpacker = msgpack.Unpacker(
                file,
                max_buffer_size=max(path.stat().st_size, 1),
                max_array_len=MAX_RANK,
                max_map_len=_MAX_KEYS,
                ext_hook=functools.partial(_array_of_extension, path),
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


def _array_of_extension(path: Path, code: int, payload: bytes) -> np.ndarray:
    if code == _COMPLEX:
        parts = _unpack_payload(payload, path)
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, float) for part in parts):
            raise corrupt(path, "a complex number is not a pair")
        return np.asarray(complex(*parts))
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
    return np.frombuffer(fields[2], spec.dtype).reshape(shape)


def _unpack_payload(payload: bytes, path: Path) -> object:
    def refuse(code: int, data: bytes) -> None:
        raise corrupt(path, "an array contains another extension type")

    return msgpack.unpackb(payload, ext_hook=refuse, max_array_len=MAX_RANK, max_map_len=0)


def _joined(stored: dict[str, object], path: Path) -> np.ndarray:
    """An array that was stored in pieces: flat chunks "0", "1", ... and its shape as a dict "0", "1", ..."""
    if set(stored) != {_CHUNKED, "shape", "chunks"} or stored[_CHUNKED] is not True:
        raise corrupt(path, "a chunked array is not (shape, chunks)")
    shape = check_shape(_listed(stored["shape"], path), "(chunked)", path)
    chunks = _listed(stored["chunks"], path)
    flat = [chunk for chunk in chunks if isinstance(chunk, np.ndarray) and chunk.ndim == 1]
    if not chunks or len(flat) != len(chunks):
        raise corrupt(path, "a chunked array has no chunks, or chunks that are not flat arrays")
    if len({chunk.dtype for chunk in flat}) != 1 or sum(chunk.size for chunk in flat) != math.prod(shape):
        raise corrupt(path, "the chunks of an array do not make up its shape")
    return np.concatenate(flat).reshape(shape)


def _listed(numbered: object, path: Path) -> list[object]:
    if not isinstance(numbered, dict) or set(numbered) != {str(i) for i in range(len(numbered))}:
        raise corrupt(path, "a chunked array is not numbered from 0 on")
    return [numbered[str(i)] for i in range(len(numbered))]


def _flatten(tree: object, prefix: str, into: dict[str, np.ndarray], path: Path, depth: int = 0) -> None:
    """Collects the arrays under their dotted names."""
    if depth > _MAX_DEPTH:
        raise corrupt(path, f"its parameters are nested more than {_MAX_DEPTH} levels deep")
    if isinstance(tree, np.ndarray):
        if prefix in into:
            raise corrupt(path, f"two arrays have the name {quoted(prefix)}")
        into[prefix] = tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            _flatten(value, f"{prefix}.{key}" if prefix else key, into, path, depth + 1)
    else:
        raise UserError(f"{path}: the entry {quoted(prefix)} is not an array; save only the parameters")
