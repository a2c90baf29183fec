"""``jaxft.json``: what a step folder holds, with the hash of every file. Needs neither jax nor devices.

It is written last, before the folder gets its final name (folders.py), so a step without it has lost it. Orbax has no
checksums: one flipped bit in array data was restored as a wrong number without an error (28 of 28 trials with its v1 API).
The manifest has the hash of itself too, so that a flipped bit in ``meta`` does not pass either.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from jaxft.errors import NothingUsable, UserError
from jaxft.files import MOST_DEPTH, MOST_MANIFEST_BYTES, JsonObject, fsync_folder, parse_json, read_text, write_atomic

NAME = "jaxft.json"
FORMAT = 2
"""Newest version of the layout on disk: 1, arrays written by Orbax; 2, in pieces (:mod:`jaxft.checkpoint.pieces`). A change that this code
could not read raises it; tests/golden keeps a folder per version."""

_CHECKSUM = "sha256"
_THREADS = min(4, os.cpu_count() or 1)

Kind = Literal["state", "params"]
_DTYPES = re.compile(r"bool|u?int\d+|bfloat16|float\d\w*|complex\d+")


_ORBAX = ("orbax.checkpoint", "_CHECKPOINT_METADATA", "commit_success.txt", "params", "counters")
"""What Orbax leaves in a folder that it writes, by any of which it is known if others are lost."""


class DamagedCheckpoint(NothingUsable):
    """A checkpoint whose files are not the ones that were written; an older one may do."""

    @property
    def reason(self) -> str:
        """What is wrong, without what to do about it."""
        return str(self).removesuffix("; use another checkpoint")


def was_written(folder: Path) -> bool:
    """Whether a checkpoint was stored in a folder, whatever is left of it."""
    return any((folder / name).exists() for name in (NAME, *_ORBAX))


@dataclass(frozen=True)
class LeafSpec:
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class FileSpec:
    """Size and sha256 of one file."""

    size: int
    sha256: str


class Piece(NamedTuple):
    """A part of an array that lies in one file (:mod:`jaxft.checkpoint.pieces`)."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    """One after the last, along each axis."""
    part: int
    """The number of the file."""
    offset: int
    """Its first byte there."""


@dataclass(frozen=True)
class Manifest:
    """What a step folder holds."""

    format: int
    kind: Kind
    """``state``: a whole training state; ``params``: parameters only."""
    step: int | None
    best: bool
    """Saved as the best one so far by the metric of the run."""
    tree: dict[str, LeafSpec]
    """Arrays by path: ``params/layers/attention/query/kernel``."""
    meta: dict[str, object]
    """What the caller stored besides, and under ``versions`` what wrote it."""
    files: dict[str, FileSpec]
    """By path inside the folder, all but ``jaxft.json``."""
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    """Where the pieces of each array lie, by its path; empty: Orbax wrote them."""


def copy_json(meta: Mapping[str, object]) -> dict[str, object]:
    """A copy, which the caller cannot change while it waits to be written.

    Raises:
      TypeError: JSON would not give it back as it is (tuples, int keys, NaN).
    """
    try:
        copied = json.loads(json.dumps(meta, allow_nan=False))
    except ValueError as error:
        raise TypeError(f"meta of a checkpoint must be plain JSON: {error}") from error
    if copied != meta:
        raise TypeError("meta of a checkpoint must be plain JSON: no tuples, no keys but strings")
    return copied


def _render(body: Mapping[str, object]) -> str:
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def _checksum(body: Mapping[str, object]) -> str:
    return hashlib.sha256(_render(body).encode()).hexdigest()


def seal(
    folder: Path, *, kind: Kind, step: int | None, best: bool, tree: dict[str, LeafSpec], meta: Mapping[str, object]
) -> None:
    """Hashes and fsyncs all that lies in ``folder`` and writes its manifest: from now on it is a checkpoint."""
    files = hash_and_sync(folder)
    write_atomic(folder / NAME, render(Manifest(1, kind, step, best, tree, dict(meta), files)))


def render(manifest: Manifest) -> str:
    """A manifest's text, with its checksum."""
    body: JsonObject = {
        "format": manifest.format,
        "kind": manifest.kind,
        "step": manifest.step,
        "best": manifest.best,
        "meta": manifest.meta,
        "tree": {path: {"shape": list(leaf.shape), "dtype": leaf.dtype} for path, leaf in manifest.tree.items()},
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in manifest.files.items()},
    }
    if manifest.pieces:
        found = manifest.pieces.items()
        body["pieces"] = {path: [[list(p.start), list(p.stop), p.part, p.offset] for p in some] for path, some in found}
    return _render({**body, _CHECKSUM: _checksum(body)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder.

    Raises:
      DamagedCheckpoint: there is a manifest, but not the one that was written; or it is missing beside what Orbax wrote.
      UserError: the folder is none of a checkpoint, or a newer jaxft wrote it.
    """
    path = Path(folder) / NAME
    body = _parse(path)
    number = body["format"]
    if number > FORMAT:
        raise UserError(f"{path}: checkpoint format {number}, but this jaxft reads format {FORMAT}; update jaxft")
    if number < 1:
        raise DamagedCheckpoint(
            f"{path}: checkpoint format {number}, which no jaxft has written; use another checkpoint"
        )
    if problem := next(_oddities(body), None):
        raise DamagedCheckpoint(f"{path}: {problem}, as no jaxft writes it; use another checkpoint")
    return Manifest(
        format=number,
        kind=body["kind"],
        step=body["step"],
        best=body["best"],
        tree={name: LeafSpec(tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in body["tree"].items()},
        meta=body["meta"],
        files={name: FileSpec(file["size"], file["sha256"]) for name, file in body["files"].items()},
        pieces={
            path: [Piece(tuple(start), tuple(stop), part, offset) for start, stop, part, offset in some]
            for path, some in body.get("pieces", {}).items()
        },
    )


def _oddities(body: JsonObject) -> Iterator[str]:
    """What a manifest says that none of ours does. Its checksum proves that no bit has changed, not who wrote it."""
    if missing := [key for key in ("kind", "step", "best", "meta", "tree", "files") if key not in body]:
        yield f"says no {missing[0]}"
        return
    step = body["step"]
    if body.get("kind") not in get_args(Kind):
        yield f"kind is {body.get('kind')!r:.40}"
    if step is not None and not _is_count(step):
        yield f"step is {step!r:.40}"
    if not isinstance(body.get("best"), bool):
        yield f"best is {body.get('best')!r:.40}"
    for key in ("meta", "tree", "files"):
        if not isinstance(body.get(key), dict):
            yield f"{key} is no object"
            return
    for name, leaf in body["tree"].items():
        if not _is_leaf(leaf):
            yield f"tree.{name:.60} is {leaf!r:.60}"
        if name.count("/") > MOST_DEPTH or any(place in body["tree"] for place in _above(name)):
            yield f"tree.{name:.60} lies in another array, or too deeply"
    for name, file in body["files"].items():
        parts = name.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or not name.isprintable():
            yield f"files.{name!r:.60} is no file inside"
        if not (isinstance(file, dict) and _is_count(file.get("size")) and isinstance(file.get("sha256"), str)):
            yield f"files.{name:.60} is {file!r:.60}"

    yield from _odd_pieces(body) if body["format"] > 1 else ()


def _odd_pieces(body: JsonObject) -> Iterator[str]:
    """What a manifest says of pieces that none of ours does: an array is cut along its axes, and each of its pieces lies in one file."""
    pieces = body.get("pieces")
    if not isinstance(pieces, dict) or pieces.keys() != body["tree"].keys():
        yield "says no pieces, or not those of its arrays"
        return
    for path, some in pieces.items():
        shape = body["tree"][path]["shape"]
        if (
            not isinstance(some, list)
            or not all(_is_piece(one, len(shape)) for one in some)
            or not _is_cut(some, shape)
        ):
            yield f"pieces.{path:.60} do not make up {shape!r:.40}"


def _is_piece(one: object, rank: int) -> bool:
    if not isinstance(one, list) or len(one) != 4 or not all(isinstance(side, list) for side in one[:2]):
        return False
    start, stop, part, offset = one
    return len(start) == len(stop) == rank and all(map(_is_count, (*start, *stop, part, offset)))


def _is_cut(pieces: Sequence[list[list[int]]], shape: Sequence[int]) -> bool:
    """Whether the pieces are those that an array falls into when it is cut along its axes, each once."""
    counts = []
    for axis, size in enumerate(shape):
        spans = sorted({(start[axis], stop[axis]) for start, stop, *_ in pieces})
        ends = [0, *(stop for _, stop in spans)]
        if not spans or ends[-1] != size or any(start != end for (start, _), end in zip(spans, ends, strict=False)):
            return False
        counts.append(len(spans))
    return len({tuple(start) for start, *_ in pieces}) == len(pieces) == math.prod(counts)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_leaf(leaf: object) -> bool:
    """Whether a manifest's entry of an array has a shape of a size that can be, and a type that arrays have."""
    if not isinstance(leaf, dict) or not isinstance(leaf.get("shape"), list) or not isinstance(leaf.get("dtype"), str):
        return False
    return (
        all(map(_is_count, leaf["shape"]))
        and math.prod(leaf["shape"]) < 1 << 62
        and bool(_DTYPES.fullmatch(leaf["dtype"]))
    )


def _above(name: str) -> Iterator[str]:
    """The places in the tree that a path goes through."""
    parts = name.split("/")[:-1]
    return ("/".join(parts[:end]) for end in range(1, len(parts) + 1))


def _parse(path: Path) -> JsonObject:
    """The manifest's JSON without its checksum, which has been checked. Every future format keeps these two keys."""
    try:
        text = read_text(path, MOST_MANIFEST_BYTES)
        body = parse_json(text, str(path))
        # Rendering again also catches a flipped bit in white space, or one that makes two keys equal.
        same = isinstance(body, dict) and _render(body) == text
    except (FileNotFoundError, NotADirectoryError) as error:
        if was_written(path.parent):
            lost = f"{path}: missing, nothing says whether the files beside it are those that were written"
            raise DamagedCheckpoint(f"{lost}; use another checkpoint") from error
        raise UserError(f"{path.parent} is not a jaxft checkpoint: it has no {NAME}") from error
    except (OSError, ValueError, UserError) as error:  # also NaN, which is never written
        problem = str(error).removeprefix(f"{path}: ")
        raise DamagedCheckpoint(f"{path}: damaged, not readable as JSON ({problem}); use another checkpoint") from error
    number = body.get("format") if isinstance(body, dict) else None
    if not same or body.pop(_CHECKSUM, None) != _checksum(body) or type(number) is not int:
        newer = isinstance(number, int) and number > FORMAT
        hint = f" or changed by hand; it says format {number}, this jaxft reads {FORMAT}" if newer else ""
        raise DamagedCheckpoint(f"{path}: damaged, it does not match its own checksum{hint}; use another checkpoint")
    return body


def check_files(
    folder: Path,
    manifest: Manifest,
    *,
    hashes: bool,
    within: Collection[str] | None = None,
    names: Collection[str] | None = None,
) -> None:
    """Compares the files with the manifest: existence and size always, content if ``hashes``.

    Args:
      folder: the step folder.
      manifest: what it should hold.
      hashes: read and hash the content.
      within: first parts of paths to look at, besides files at the top; None: all.
      names: the files to look at; None: all.

    Raises:
      DamagedCheckpoint: names the first file that differs.
    """
    wanted = {
        name: file
        for name, file in manifest.files.items()
        if (within is None or "/" not in name or name.partition("/")[0] in within) and (names is None or name in names)
    }
    for name, file in wanted.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            problem = "is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise _damaged(folder / name, problem) from error
        if size != file.size:
            raise _damaged(folder / name, f"has {size} bytes instead of {file.size}")
    if hashes:
        _check_hashes(folder, wanted)


def _check_hashes(folder: Path, wanted: dict[str, FileSpec]) -> None:
    try:
        found = _in_threads(folder, wanted, sync=False)
    except OSError as error:
        raise _damaged(Path(error.filename or folder), str(error)) from error
    for name, file in wanted.items():
        if found[name] != file:
            raise _damaged(folder / name, f"does not match its sha256 in {NAME}")


def _damaged(path: Path, problem: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: checkpoint damaged: this file {problem}; use another checkpoint")


def hash_and_sync(folder: Path) -> dict[str, FileSpec]:
    """Orbax fsyncs array data only: not its metadata, not the folders, not the rename into place."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path != folder / NAME
    )
    files = _in_threads(folder, names, sync=True)
    for inside in (path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inside)
    fsync_folder(folder)
    fsync_folder(folder.parent)
    return files


def _in_threads(folder: Path, names: Iterable[str], *, sync: bool) -> dict[str, FileSpec]:
    names = list(names)
    # hashlib lets go of the GIL; one thread hashes 0.8 GB/s.
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(folder / name, sync), names), strict=True))


def _hash(path: Path, sync: bool) -> FileSpec:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        if sync:
            os.fsync(file.fileno())
    return FileSpec(size, digest)
