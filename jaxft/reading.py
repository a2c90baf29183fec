"""Small files that somebody else wrote, read within bounds: none can hang, fill the memory, or end in anything but one line.

Every reader of JSON and of settings comes here. Weights and rows, which may be as large as they like, have readers of their own
(``hub/weights``, ``data/sources``).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

from jaxft.errors import UserError
from jaxft.files import JsonObject

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
    """All of a file that may not be larger than ``most`` bytes.

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
    return tree


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


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
