"""The files of a corpus: shards of flat tokens with the places where documents begin, and the manifest, which is written last.

While it is built, a folder holds a plan, which says what is done, and a seal for each part that is done. What a part leaves follows from
the plan alone, so that any number of processes and machines, killed and begun anew, leave the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, NotRequired, TypedDict, cast

import numpy as np

from jaxft.errors import UserError, not_written
from jaxft.files import JsonObject, fits, fsync_folder, parse_json, read_bytes, write_atomic

MANIFEST = "corpus.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer"
LENGTHS = "lengths.bin"
FORMAT = 1
"""Version of the layout on disk; a change that this code could not read raises it."""
MOST_BYTES = 1 << 30
"""Bytes of a manifest: 500 for each of two million shards."""
AGAIN = "remove the folder and build it again (jaxft data build)"
_CHECKSUM = "sha256"
_HASHED = 1 << 22


class FileSaid(TypedDict):
    """What is said of a file."""

    size: int
    sha256: str


class ShardSaid(TypedDict):
    """What is said of a shard."""

    documents: int
    tokens: int
    files: dict[str, FileSaid]
    origins: NotRequired[list[list[int]]]
    """What its documents are of, one stretch after the other: which source of the command, how many documents, bytes of their texts in
    UTF-8. Builds of earlier versions did not say."""


class Body(TypedDict):
    """What a manifest says, without its checksum."""

    key: JsonObject
    """What the corpus was made of and by."""
    dtype: str
    documents: int
    tokens: int
    shards: list[ShardSaid]
    lengths: FileSaid
    statistics: JsonObject
    digest: str


class Seal(TypedDict):
    """What is said of a part that is done."""

    shards: dict[str, ShardSaid]
    """By split."""
    counts: dict[str, int]
    places: dict[str, str]
    """Where something was first seen that is counted."""
    source: str
    """A hash of the bytes that it was read from."""
    times: list[int]
    """When each of its files was changed last, in ns; no manifest says so."""


def shard_files(number: int) -> tuple[str, str]:
    """The names of a shard's files: tokens, and where documents begin among them."""
    return f"tokens-{number:05d}.bin", f"starts-{number:05d}.bin"


def seal_file(number: int) -> str:
    """The name of a part's seal."""
    return f"part-{number:05d}.json"


def is_corpus(folder: Path) -> bool:
    """Whether a folder is a corpus, or one that is being built."""
    return (folder / MANIFEST).is_file() or (folder / PLAN).is_file()


def token_type(vocabulary: int) -> np.dtype:
    """The type that tokens are stored in."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


# ------------------------------------------------------------------------------------------------- written


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that is on the disk, under its name, when the block ends without an error, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent != path.parent:
            raise
        raise not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


class Hashed:
    """A file that is written and hashed at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def write(self, values: np.ndarray) -> None:
        """Appends the bytes of an array."""
        data = np.ascontiguousarray(values).data.cast("B")
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def said(self) -> FileSaid:
        """Size and hash so far."""
        return {"size": self._size, "sha256": self._hash.hexdigest()}


def file_said(path: Path) -> FileSaid:
    """Size and hash of a file on disk."""
    found, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_HASHED):
            found.update(block)
            size += len(block)
    return {"size": size, "sha256": found.hexdigest()}


def write_sealed(path: Path, body: Mapping[str, object]) -> None:
    """Writes a JSON object with a hash of itself."""
    body = {"format": FORMAT, **body}
    try:
        write_atomic(path, _render({**body, _CHECKSUM: _checksum(body)}))
    except OSError as error:
        raise not_written(path, error) from error


def read_sealed(path: Path, kind: type) -> JsonObject:
    """What such a file says.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged, or another version wrote it.
    """
    raw, damaged = read_bytes(path, MOST_BYTES), f"{path}: damaged: not what was written; {AGAIN}"
    try:
        body = parse_json(raw, str(path))
    except UserError as error:
        raise UserError(damaged) from error
    if not isinstance(body, dict) or "format" not in body:
        raise UserError(damaged)
    if body["format"] != FORMAT:
        raise UserError(f"{path}: format {body['format']}, but this jaxft reads format {FORMAT}; {AGAIN}")
    try:
        same = body.pop(_CHECKSUM, None) == _checksum(body)
    except ValueError:  # NaN, which is never written
        same = False
    if not same or not fits(body, kind):
        raise UserError(damaged)
    return body


def _render(body: Mapping[str, object]) -> str:
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def _checksum(body: Mapping[str, object]) -> str:
    return hashlib.sha256(_render(body).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- read


def read_manifest(folder: Path) -> Body:
    """What a corpus says of itself; its files have the sizes that it says.

    Raises:
      UserError: there is none, it is not finished or damaged, another version wrote it, or a file is gone, too short or too long.
    """
    try:
        body = cast(Body, read_sealed(folder / MANIFEST, Body))
    except FileNotFoundError as error:
        if (folder / PLAN).is_file():
            raise UserError(
                f"{folder}: a corpus whose build is not finished (no {MANIFEST}); the same jaxft data build goes on with it"
            ) from error
        raise UserError(f"{folder}: holds no corpus (no {MANIFEST})") from error
    files = {name: said for shard in body["shards"] for name, said in shard["files"].items()}
    for name, said in (files | {LENGTHS: body["lengths"]}).items():
        if "/" in name or not 0 <= said["size"] < 1 << 62:
            raise UserError(f"{folder / MANIFEST}: damaged: not what was written; {AGAIN}")
        check_file(folder / name, said)
    return body


def check_file(path: Path, said: FileSaid) -> None:
    """Raises UserError if a file has not the size that it should have."""
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise UserError(f"{path}: this file of a corpus is gone; {AGAIN}")
    if found != said["size"]:
        what = "short: it was cut off" if found < said["size"] else "long"
        raise UserError(f"{path}: this file of a corpus is too {what} ({found} bytes, not {said['size']}); {AGAIN}")


def damages(folder: Path) -> Iterator[str]:
    """The files that are not as they were written, a line each.

    Raises:
      UserError: as :func:`read_manifest`.
    """
    body = read_manifest(folder)
    files = {name: said for shard in body["shards"] for name, said in shard["files"].items()}
    for name, said in (files | {LENGTHS: body["lengths"]}).items():
        if file_said(folder / name) != said:
            yield f"{folder / name}: its bytes are not those that were written"


def digest_of(shards: Sequence[ShardSaid]) -> str:
    """A hash of all tokens and of where documents begin."""
    found = hashlib.sha256()
    for shard in shards:
        for said in shard["files"].values():
            found.update(said["sha256"].encode())
    return found.hexdigest()


class Shard(NamedTuple):
    """A shard, memory-mapped."""

    tokens: np.ndarray
    """[tokens] unsigned integers."""
    offsets: np.ndarray
    """[documents + 1] int64, where each document begins, from 0."""


def opened(folder: Path, number: int, said: ShardSaid, dtype: str) -> Shard:
    """The arrays of a shard. Sizes on disk must have been checked."""
    tokens, offsets = shard_files(number)
    return Shard(mapped(folder / tokens, dtype, said["tokens"]), mapped(folder / offsets, "<i8", said["documents"] + 1))


def mapped(path: Path, dtype: str, *shape: int) -> np.ndarray:
    """A file as an array."""
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    with open(path, "rb") as file:
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # A plain array: slices of numpy's own memmap class cost several times as much.
    return np.frombuffer(found, dtype).reshape(shape)


def remove_leftovers(folder: Path) -> None:
    """Removes what a build needs no more once its manifest is written."""
    for pattern in (
        PLAN,
        "part-*.json",
        ".part-*",
        ".tokens-*",
        ".starts-*",
        "hashes-*.bin",
        ".hashes-*",
        f".{PLAN}.*",
    ):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    fsync_folder(folder)
