"""Files of torch before 1.6 (and of its ``_use_new_zipfile_serialization=False``): five pickles, then the storages.

In a row: a magic number, the version of the format, facts about the machine, the dict of tensors, the keys of the storages;
then, in the order of the keys, the number of elements (int64) and the elements of each storage. Written and read by
``_legacy_save`` and ``_legacy_load`` of torch/serialization.py.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from jaxft.errors import UserError
from jaxft.hub.weights.contract import corrupt
from jaxft.hub.weights.pread import RandomAccessFile
from jaxft.hub.weights.torch_pickle import MAX_PICKLE_BYTES, StorageRef, TensorRef, read_pickle, state_dict_of

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_CHUNK = 1 << 20


class Record(NamedTuple):
    """Bytes of the file that belong to one storage."""

    offset: int
    size: int
    crc: int | None = None
    """CRC-32 of the bytes, where the file has one."""


def is_legacy(file: RandomAccessFile) -> bool:
    """Whether a file begins as torch before 1.6 began them: with a pickle of the magic number."""
    start = file.bytes_at(0, min(file.size, 32))
    return start[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in start


def read_legacy(file: RandomAccessFile) -> tuple[dict[str, TensorRef], dict[str, Record]]:
    """The tensors of a file for which :func:`is_legacy` holds, and where each of their storages lies, by its key.

    Raises:
      UserError: the file asks for anything but plain tensors in one dict, is malformed, or is cut off.
    """
    path, stream = file.path, _Stream(file)
    if read_pickle(stream, path).value != _MAGIC:
        raise corrupt(path, "its first number is not that of torch's files")
    version = read_pickle(stream, path).value
    machine = read_pickle(stream, path).value
    if version != _VERSION:
        raise corrupt(path, f"it says version {version!r} of its format, there is only {_VERSION}")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UserError(f"{path} was saved with a byte order other than little; save it on another machine")
    described = read_pickle(stream, path)
    tensors = state_dict_of(described.value, path)
    keys = read_pickle(stream, path).value
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(described.storages):
        raise corrupt(path, "the list of its storages is not that of its tensors")
    return tensors, _records(file, stream.tell(), [described.storages[str(key)] for key in keys])


def _records(file: RandomAccessFile, position: int, storages: list[StorageRef]) -> dict[str, Record]:
    records = {}
    for storage in storages:
        size = storage.length * storage.dtype.itemsize
        if storage.length < 0 or position + 8 + size > file.size:
            raise corrupt(file.path, "it ends before its last storage does")
        (length,) = struct.unpack("<q", file.bytes_at(position, 8))
        if length != storage.length:
            raise corrupt(file.path, f"a storage has {length} elements, {storage.length} are said to be there")
        records[storage.key] = Record(position + 8, size)
        position += 8 + size
    if position != file.size:
        raise corrupt(file.path, f"{file.size - position} bytes are left over at its end")
    return records


class _Stream:
    """The start of a file as pickletools reads it: at most MAX_PICKLE_BYTES, whatever lengths the file claims."""

    def __init__(self, file: RandomAccessFile) -> None:
        self._file, self._position = file, 0
        self._end = min(file.size, MAX_PICKLE_BYTES)
        self._chunk, self._start = b"", 0

    def tell(self) -> int:
        """Bytes read so far."""
        return self._position

    def read(self, count: int) -> bytes:
        """The next bytes; fewer at the end."""
        count = max(0, min(count, self._end - self._position))
        at = self._position - self._start
        if at < 0 or at + count > len(self._chunk):
            self._start, at = self._position, 0
            self._chunk = self._file.bytes_at(self._start, min(max(count, _CHUNK), self._end - self._start))
        self._position += count
        return self._chunk[at : at + count]

    def readline(self) -> bytes:
        """The rest of the line; what there is where it has no end."""
        start, parts = self._position, []
        while part := self.read(256):
            if b"\n" in part:
                parts.append(part[: part.index(b"\n") + 1])
                break
            parts.append(part)
        line = b"".join(parts)
        self._position = start + len(line)
        return line
