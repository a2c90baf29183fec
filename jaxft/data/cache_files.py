"""The files of a token cache: flat little-endian arrays, each with a hash per block, and the manifest that says what they are.

The manifest is written last: a folder that lacks it is not a cache. It has a hash of itself too.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np

from jaxft.errors import UserError
from jaxft.files import MOST_MANIFEST_BYTES, JsonObject, fits, parse_json, read_bytes, write_atomic

MANIFEST = "cache.json"
FORMAT = 1
"""Version of the layout on disk; a change that this code could not read raises it."""
BLOCK = 1 << 22
"""Bytes that are hashed together: as exactly as damage is placed."""
DROPPED = "dropped.bin"
AGAIN = "remove the folder and build it again (jaxft cache build)"
_CHECKSUM = "sha256"
_DTYPE = re.compile(r"[<|][uifb]\d")


def column_file(field: str) -> str:
    """The name of a field's file."""
    return f"column-{field}.bin"


def offsets_file(axis: str) -> str:
    """The name of the file that says where rows begin along an axis."""
    return f"offsets-{axis}.bin"


def is_cache(folder: Path) -> bool:
    """Whether a folder is a token cache, or what is left of one."""
    return (folder / MANIFEST).is_file() or is_unfinished(folder)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds files of a cache without the manifest that would make them one."""
    if (folder / MANIFEST).is_file():
        return False
    return any(any(folder.glob(pattern)) for pattern in (DROPPED, "offsets-*.bin", "column-*.bin"))


def remove_cache(folder: Path) -> None:
    """Removes a cache's files, the manifest first, and the folder if nothing else is in it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for pattern in ("offsets-*.bin*", "column-*.bin*", f"{DROPPED}*", f".{MANIFEST}.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@dataclass(frozen=True)
class Stored:
    """One array on disk."""

    file: str
    dtype: str
    """Element type as numpy writes it, with its byte order: ``<u2``."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def opened(self, folder: Path) -> np.ndarray:
        """The array, memory-mapped. Its size on disk must have been checked."""
        dtype = np.dtype(self.dtype)
        if self.size == 0:
            return np.zeros(self.shape, dtype)
        with open(folder / self.file, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # A plain array: slices of numpy's own memmap class cost several times as much.
        return np.frombuffer(mapped, dtype).reshape(self.shape)


def hashes(path: Path) -> Iterator[tuple[bytes, str]]:
    """(content, sha256) of each block of a file."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block, hashlib.sha256(block).hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


class ArraySaid(TypedDict):
    """What a manifest says of an array."""

    file: str
    dtype: str
    shape: list[int]
    axes: NotRequired[list[str | int]]
    """Axes of the column's field."""


class FileSaid(TypedDict):
    """What a manifest says of a file."""

    size: int
    sha256: list[str]
    """sha256 of each block."""


class Body(TypedDict):
    """What a manifest says, without its checksum."""

    examples: int
    columns: dict[str, ArraySaid]
    offsets: dict[str, ArraySaid]
    dropped: ArraySaid
    made: dict[str, object]
    about: JsonObject
    """What whoever wrote it had to say."""
    digest: str
    files: dict[str, FileSaid]


def write_manifest(folder: Path, body: Mapping[str, object]) -> None:
    """Makes the files of ``folder`` a cache."""
    body = {"format": FORMAT, **body}
    write_atomic(folder / MANIFEST, _render({**body, _CHECKSUM: _checksum(body)}))


def _render(body: Mapping[str, object]) -> str:
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def _checksum(body: Mapping[str, object]) -> str:
    return hashlib.sha256(_render(body).encode()).hexdigest()


def read_manifest(folder: Path) -> Body:
    """What a cache's manifest says; the files that it names have the sizes that it says.

    Raises:
      UserError: there is none, it is damaged, another version wrote it, or a file is gone, too short or too long.
    """
    body = _manifest(folder)
    for name, said in body["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise UserError(f"{path}: this file of a token cache is gone; {AGAIN}")
        if found != said["size"]:
            what = "short: it was cut off" if found < said["size"] else "long"
            raise UserError(
                f"{path}: this file of a token cache is too {what} ({found} bytes, not {said['size']}); {AGAIN}"
            )
    return body


def _manifest(folder: Path) -> Body:
    path = folder / MANIFEST
    try:
        raw = read_bytes(path, MOST_MANIFEST_BYTES)
    except FileNotFoundError as error:
        if is_unfinished(folder):
            raise UserError(
                f"{folder}: a token cache without its {MANIFEST}, which is written last: it was not finished; {AGAIN}"
            ) from error
        raise UserError(f"{folder}: holds no token cache (no {MANIFEST})") from error
    damaged = f"{path}: damaged: not the manifest that was written; {AGAIN}"
    try:
        body = parse_json(raw, str(path))
    except UserError as error:
        raise UserError(damaged) from error
    if not isinstance(body, dict) or "format" not in body:
        raise UserError(damaged)
    if body["format"] != FORMAT:
        raise UserError(f"{path}: cache format {body['format']}, but this jaxft reads format {FORMAT}; {AGAIN}")
    try:
        same = body.pop(_CHECKSUM, None) == _checksum(body)
    except ValueError:  # NaN, which is never written
        same = False
    # Its checksum proves that no bit has changed, not who wrote it.
    if not same or not fits(body, Body) or not all(_is_stored(array, body) for array in _arrays_of(body)):
        raise UserError(damaged)
    return cast(Body, body)


def _arrays_of(body: JsonObject) -> list[JsonObject]:
    return [*body["columns"].values(), *body["offsets"].values(), body["dropped"]]


def _is_stored(said: JsonObject, body: JsonObject) -> bool:
    """Whether an array is one of numbers, in a file of its size in the cache's own folder."""
    file, shape = body["files"].get(said["file"]), said["shape"]
    sound = "/" not in said["file"] and all(0 <= size < 1 << 62 for size in shape)
    if not sound or file is None or not _DTYPE.fullmatch(said["dtype"]):
        return False
    return math.prod(shape) * np.dtype(said["dtype"]).itemsize == file["size"]


def damages(folder: Path) -> Iterator[str]:
    """What is not as it was written, a line each: the file, and between which bytes.

    Raises:
      UserError: as :func:`read_manifest`.
    """
    body = read_manifest(folder)
    for name, said in body["files"].items():
        wrong = [i for i, (_, digest) in enumerate(hashes(folder / name)) if digest != said["sha256"][i]]
        for first, last in _runs(wrong):
            end = min((last + 1) * BLOCK, said["size"])
            yield f"{folder / name}: bytes {first * BLOCK} to {end - 1} are not those that were written"


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of successive numbers."""
    begins = [number for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    ends = [number for i, number in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != number + 1]
    return zip(begins, ends, strict=True)
