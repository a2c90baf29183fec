"""Sums of what a folder was exported with: ``SHA256SUMS``, as coreutils' ``sha256sum -c`` reads it.

Weights that lost 4 KiB on their way, or swapped two blocks, serve other answers without an error; names, shapes and types are
still right. A folder that has such a file is compared with it before anything in it is used; others are read as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from jaxft.errors import UserError, printable
from jaxft.files import write_atomic

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_MOST_BYTES = 1 << 20  # of the file itself: thousands of names
_THREADS = 4
_EDITED = (".md",)  # for people, who change it as they like; nothing is computed from it


def write_sums(folder: Path) -> None:
    """Writes the sums of all files that lie in a folder, model cards aside."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != NAME and path.suffix not in _EDITED
    )
    write_atomic(folder / NAME, "".join(f"{found}  {name}\n" for name, found in _sums(folder, names).items()))


def check_sums(folder: Path, only: Collection[str] | None = None) -> None:
    """Compares the files of a folder with its ``SHA256SUMS``, if it has one.

    Args:
      folder: that was exported, perhaps.
      only: the names of those to look at; None: all.

    Raises:
      UserError: a file is missing or another than was exported, or the sums themselves are damaged.
    """
    wanted = {name: said for name, said in _read(folder).items() if only is None or name in only}
    meant = f"; copy it again, or, if the change is meant, remove its line from {NAME}"
    for name in wanted:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, though {NAME} has it{meant}")
    found = _sums(folder, list(wanted))
    for name, said in wanted.items():
        if found[name] != said:
            raise UserError(
                f"{folder / name}: not the file that was exported (its sha256 is not that in {NAME}){meant}"
            )


def _read(folder: Path) -> dict[str, str]:
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; remove it to use the folder as it is") from error
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        inside = (
            match is not None
            and not {"..", ""} & set(match[2].split("/"))
            and not PurePosixPath(match[2]).is_absolute()
        )
        if match is None or not inside or len(text) > _MOST_BYTES:
            said = printable(line[:60])
            raise UserError(
                f"{path}, line {number}: not the sum of a file inside: {said!r}; remove it to use the folder as it is"
            )
        found[match[2]] = match[1]
    return found


def _sums(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib lets go of the GIL
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def _sum(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the disk or its permissions") from error
