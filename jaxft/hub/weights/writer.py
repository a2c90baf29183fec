"""Writing safetensors the way transformers lays them out, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxft.errors import UserError
from jaxft.files import fsync_folder, write_atomic
from jaxft.hub.weights.contract import MAX_RANK
from jaxft.hub.weights.dtypes import SAFETENSORS_NAMES
from jaxft.hub.weights.safetensors_file import MAX_HEADER_BYTES


@dataclass(frozen=True)
class TensorOut:
    """A tensor to write; ``read`` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_safetensors(
    folder: Path, tensors: Sequence[TensorOut], shard_bytes: int = 5 * 10**9, *, stem: str = "model"
) -> list[Path]:
    """Writes ``model.safetensors`` (or of another ``stem``), or shards of at most ``shard_bytes`` of tensors and their index.

    A tensor larger than ``shard_bytes`` has a shard of its own. Files get their names only when all are written.

    Returns:
      The files, the index last if there is one.
    Raises:
      UserError: the folder has safetensors weights already, or the disk refuses.
      ValueError: a tensor is not what its TensorOut says, or cannot be stored.
    """
    _check_tensors(tensors)
    existing = sorted(folder.glob(f"{stem}*.safetensors")) + sorted(folder.glob(_index_name(stem)))
    if existing:
        # A reader prefers model.safetensors over an index: leftovers would be loaded instead of what we write.
        raise UserError(f"{existing[0]} already exists; write to another folder or remove it first")
    shards = _split(tensors, shard_bytes)
    _make_folder(folder)
    paths = [folder / _shard_name(stem, number, len(shards)) for number in range(1, len(shards) + 1)]
    temporaries = [path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}") for path in paths]
    try:
        for temporary, shard in zip(temporaries, shards, strict=True):
            with open(temporary, "wb") as file:
                _write_shard(file, shard)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        fsync_folder(folder)
        if len(paths) > 1:
            write_atomic(folder / _index_name(stem), _index_text(paths, shards))
            paths.append(folder / _index_name(stem))
    except OSError as error:
        raise UserError(
            f"cannot write weights to {folder}: {error.strerror}; free space or name another place"
        ) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    return paths


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write weights to {folder}: {error.strerror}; name another place") from error


def _check_tensors(tensors: Sequence[TensorOut]) -> None:
    if not tensors:
        raise ValueError("no tensors to write")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors to write have the same name")
    for tensor in tensors:
        if tensor.name == "__metadata__":
            raise ValueError("'__metadata__' is reserved in safetensors and cannot name a tensor")
        if np.dtype(tensor.dtype) not in SAFETENSORS_NAMES:
            raise ValueError(f"tensor {tensor.name!r}: safetensors has no dtype {tensor.dtype}")
        if len(tensor.shape) > MAX_RANK or any(size <= 0 for size in tensor.shape):
            raise ValueError(f"tensor {tensor.name!r}: shape {tensor.shape} has a zero dimension or too many")


def _split(tensors: Sequence[TensorOut], shard_bytes: int) -> list[list[TensorOut]]:
    """In order, a new shard whenever the next tensor would exceed the limit."""
    shards: list[list[TensorOut]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _write_shard(file: BinaryIO, shard: list[TensorOut]) -> None:
    # Widest elements first, as the reference writer does: every tensor then starts at a multiple of its element size,
    # which readers that map the file rely on.
    ordered = sorted(shard, key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise ValueError(f"the header would have {len(raw)} bytes; safetensors allows {MAX_HEADER_BYTES}")
    file.write(len(raw).to_bytes(8, "little") + raw)
    for tensor in ordered:
        _write_tensor(file, tensor)
    file.flush()
    os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, tensor: TensorOut) -> None:
    """A function of its own so that the array is gone before the next one is made."""
    array = np.asarray(tensor.read())
    if array.shape != tuple(tensor.shape) or array.dtype != tensor.dtype:
        raise ValueError(
            f"tensor {tensor.name!r} was announced as {tensor.shape} {tensor.dtype} but is {array.shape} {array.dtype}"
        )
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _index_text(paths: Sequence[Path], shards: Sequence[Sequence[TensorOut]]) -> str:
    weight_map = {tensor.name: path.name for path, shard in zip(paths, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
