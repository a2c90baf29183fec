"""safetensors files: 8 bytes of header length, a JSON header, then the tensors without gaps.

The header is checked in full at opening (https://huggingface.co/docs/safetensors): what passes can be read in
bounds. We parse it ourselves because the reference numpy loader has no bfloat16 and maps or copies whole files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.hub.weights.contract import TensorSpec, Weights, check_name, check_shape, corrupt, quoted
from jaxft.hub.weights.dtypes import SAFETENSORS
from jaxft.hub.weights.pread import RandomAccessFile
from jaxft.hub.weights.strict_json import parse_object

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit


class SafetensorsFile(Weights):
    """One safetensors file, open."""

    def __init__(self, path: Path) -> None:
        self._file = RandomAccessFile(path)
        try:
            self._offsets, specs = _read_header(self._file)
            super().__init__(path, "safetensors", specs)
        except BaseException:
            self._file.close()
            raise

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        skipped = 0 if rows is None else rows[0] * (out.nbytes // (rows[1] - rows[0]))
        self._file.read_at(self._offsets[name] + skipped, out)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _read_header(file: RandomAccessFile) -> tuple[dict[str, int], dict[str, TensorSpec]]:
    """Offsets in the file and specs, by name, in the order of the data."""
    path = file.path
    if file.size < 8:
        raise corrupt(path, f"{file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.bytes_at(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise corrupt(path, f"its header claims {length} bytes, more than the format's limit of {MAX_HEADER_BYTES}")
    if 8 + length > file.size:
        raise corrupt(path, f"its header claims {length} bytes, but the file has {file.size}")
    header = parse_object(file.bytes_at(8, length), path, "the header")
    _check_metadata(header.pop("__metadata__", {}), path)

    ranges: list[tuple[int, int, str, TensorSpec]] = []
    for name, entry in header.items():
        ranges.append((*_tensor_range(entry, name, path), check_name(name, path), _tensor_spec(entry, name, path)))
    ranges.sort(key=lambda item: item[:2])

    end_of_data = file.size - 8 - length
    expected = 0
    for begin, end, name, spec in ranges:
        if begin != expected:
            raise corrupt(path, f"tensor {quoted(name)} begins at byte {begin} of the data instead of {expected}")
        if end > end_of_data:
            raise corrupt(path, f"tensor {quoted(name)} ends at byte {end} of {end_of_data} bytes of data")
        if end - begin != spec.nbytes:
            raise corrupt(path, f"tensor {quoted(name)} has {end - begin} bytes, its shape needs {spec.nbytes}")
        expected = end
    if expected != end_of_data:
        raise corrupt(path, f"{end_of_data - expected} bytes after the last tensor belong to nothing")
    return (
        {name: 8 + length + begin for begin, _, name, _ in ranges},
        {name: spec for _, _, name, spec in ranges},
    )


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(path, "__metadata__ in the header is not a map from text to text")


def _tensor_range(entry: object, name: str, path: Path) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(path, f"the header entry of {quoted(name)} is not exactly dtype, shape and data_offsets")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise corrupt(path, f"data_offsets of {quoted(name)} are not two integers")
    begin, end = offsets
    if not 0 <= begin < end < 1 << 62:
        raise corrupt(path, f"data_offsets of {quoted(name)} are not an increasing pair")
    return begin, end


def _tensor_spec(entry: Any, name: str, path: Path) -> TensorSpec:
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        shown = quoted(dtype) if isinstance(dtype, str) else "that is not text"
        raise UserError(
            f"{path}: tensor {quoted(name)} has dtype {shown}, which jaxft does not read; "
            f"store it as one of {', '.join(SAFETENSORS)}"
        )
    return TensorSpec(check_shape(entry["shape"], name, path), SAFETENSORS[dtype])
