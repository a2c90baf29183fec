"""``pytorch_model.bin`` without torch: raw storages and one pickle that describes views of them, in a zip archive (or, before
torch 1.6, in a row: :mod:`jaxft.hub.weights.torch_legacy`).

The archive's directory and the pickle are read at opening; tensor bytes are read on demand from their place in the
file, which works because torch stores records uncompressed. The checksum of a storage, which the archive has and torch's own reader
does not look at, is verified when something of it is first read.
"""

from __future__ import annotations

import math
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np

from jaxft.errors import UserError
from jaxft.hub.weights.contract import TensorSpec, Weights, corrupt, quoted
from jaxft.hub.weights.pread import RandomAccessFile
from jaxft.hub.weights.torch_legacy import Record, is_legacy, read_legacy
from jaxft.hub.weights.torch_pickle import MAX_PICKLE_BYTES, TensorRef, how_to_save_again, read_state_dict

_BLOCK = 16 << 20  # bytes read together for a checksum
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, name length, extra length: 30 bytes before the name


class TorchFile(Weights):
    """One file written by ``torch.save`` of a state_dict, open."""

    def __init__(self, path: Path) -> None:
        self._file = RandomAccessFile(path)
        try:
            if is_legacy(self._file):
                self._tensors, records = read_legacy(self._file)
            else:
                archived = _records(self._file)
                self._tensors = read_state_dict(_content(self._file, archived["data.pkl"], "data.pkl"), path)
                inside = ((name.partition("/"), record) for name, record in archived.items())
                records = {key: record for (folder, _, key), record in inside if folder == "data"}
            for name, tensor in self._tensors.items():
                _check_tensor(name, tensor, records, path)
            self._storages = records
            self._unchecked = {key: threading.Lock() for key, record in records.items() if record.crc is not None}
            specs = {name: TensorSpec(ref.shape, ref.storage.dtype) for name, ref in self._tensors.items()}
            super().__init__(path, "pytorch", specs)
        except BaseException:
            self._file.close()
            raise

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        ref = self._tensors[name]
        self._check_storage(name)
        first = ref.offset + (0 if rows is None else rows[0] * ref.stride[0])
        position = self._storages[ref.storage.key].offset + first * out.itemsize
        if _is_contiguous(out.shape, ref.stride):
            self._file.read_at(position, out)
            return
        # A transposed or sliced view: read the span that it covers (never more than its storage), then gather.
        span = np.empty(_span(out.shape, ref.stride), out.dtype)
        self._file.read_at(position, span)
        stride_bytes = tuple(step * out.itemsize for step in ref.stride)
        np.copyto(out, np.lib.stride_tricks.as_strided(span, out.shape, stride_bytes, writeable=False))

    def _check_storage(self, name: str) -> None:
        """Compares the storage of a tensor with its checksum, once."""
        key = self._tensors[name].storage.key
        lock = self._unchecked.get(key)
        if lock is None:
            return
        with lock:
            if key not in self._unchecked:
                return  # by another thread, meanwhile
            record = self._storages[key]
            crc, block = 0, np.empty(min(_BLOCK, record.size), np.uint8)
            for start in range(0, record.size, _BLOCK):
                part = block[: min(_BLOCK, record.size - start)]
                self._file.read_at(record.offset + start, part)
                crc = zlib.crc32(part, crc)
            if crc != record.crc:
                raise corrupt(self.path, f"the numbers of tensor {quoted(name)} do not match their checksum")
            del self._unchecked[key]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements lie between the first and the last of a strided view, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _check_tensor(name: str, ref: TensorRef, records: dict[str, Record], path: Path) -> None:
    """Everything that reading relies on: the record exists, has the claimed size, and contains the view."""
    storage = ref.storage
    record = records.get(storage.key)
    if record is None:
        raise corrupt(path, f"the storage {quoted(storage.key)} of tensor {quoted(name)} is missing")
    if record.size != storage.length * storage.dtype.itemsize:
        raise corrupt(path, f"the storage of tensor {quoted(name)} has {record.size} bytes, not what it claims")
    if len(ref.stride) != len(ref.shape) or any(step < 0 for step in ref.stride) or ref.offset < 0:
        raise corrupt(path, f"tensor {quoted(name)} has an impossible stride or offset")
    if ref.offset + _span(ref.shape, ref.stride) > storage.length:
        raise corrupt(path, f"tensor {quoted(name)} reaches beyond the end of its storage")
    if math.prod(ref.shape) > storage.length:
        # Stride 0 could claim terabytes from one stored number.
        how = how_to_save_again(path, "; s = {k: v.contiguous() for k, v in s.items()}")
        raise UserError(
            f"{path}: tensor {quoted(name)} is an expanded view of fewer numbers; save its .contiguous(): {how}"
        )


def _records(file: RandomAccessFile) -> dict[str, Record]:
    """The archive's records, by name without the leading folder (which is the same for all)."""
    path = file.path
    if file.size < 4 or file.bytes_at(0, 4) != b"PK\x03\x04":
        raise UserError(_not_an_archive(file))
    try:
        with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    # What zipfile raises on damaged directories, besides its own class; OSError from seeks to nonsense.
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OSError, OverflowError):
        raise corrupt(path, "its zip directory cannot be read") from None

    roots = [entry.filename.removesuffix("/data.pkl") for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise UserError(f"{path} is a zip archive, but not one that torch.save writes (it needs one NAME/data.pkl)")
    records: dict[str, Record] = {}
    for entry in entries:
        folder, _, name = entry.filename.partition("/")
        if folder != roots[0] or name in records:
            raise corrupt(path, f"the zip record {quoted(entry.filename)} is out of place or appears twice")
        records[name] = _locate(entry, file)
    _check_byte_order(records, file)
    if records["data.pkl"].size > MAX_PICKLE_BYTES:
        raise corrupt(path, f"data.pkl is larger than {MAX_PICKLE_BYTES} bytes")
    return records


def _content(file: RandomAccessFile, record: Record, name: str) -> bytes:
    content = file.bytes_at(record.offset, record.size)
    if record.crc is not None and zlib.crc32(content) != record.crc:
        raise corrupt(file.path, f"{name} does not match its checksum")
    return content


def _check_byte_order(records: dict[str, Record], file: RandomAccessFile) -> None:
    # torch before 2.1 wrote no such record and only ran on little-endian machines in practice; torch assumes the same.
    if "byteorder" not in records:
        return
    record = records["byteorder"]
    if record.size > 16 or file.bytes_at(record.offset, record.size) != b"little":
        raise UserError(f"{file.path} was saved with a byte order other than little; save it on another machine")


def _locate(entry: zipfile.ZipInfo, file: RandomAccessFile) -> Record:
    """Where a record's bytes are; the directory only says where its local header is."""
    path, name = file.path, quoted(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1 or entry.compress_size != entry.file_size:
        raise UserError(f"{path}: the zip record {name} is compressed or encrypted, which torch never writes; refused")
    if not 0 <= entry.header_offset <= file.size - 30:
        raise corrupt(path, f"the zip record {name} lies outside the file")
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.bytes_at(entry.header_offset, 30))
    offset = entry.header_offset + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or offset + entry.file_size > file.size:
        raise corrupt(path, f"the zip record {name} lies outside the file")
    return Record(offset, entry.file_size, entry.CRC or None)  # torch writes 0 where it was told to compute none


def _not_an_archive(file: RandomAccessFile) -> str:
    # The tar archives of torch before 0.1.10 have this mark in their first header.
    if file.size >= 262 and file.bytes_at(257, 5) == b"ustar":
        how = how_to_save_again(file.path)
        return f"{file.path} is a tar archive of torch before 0.1.10; save it anew where torch is installed: {how}"
    return f"{file.path} is not a PyTorch weights file (or is corrupt); download or copy it again"
