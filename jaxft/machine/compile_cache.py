"""XLA's persistent compilation cache: where it lies, and an end to entries that a crash cut off."""

from __future__ import annotations

import importlib
import os
import sys
import zlib
from pathlib import Path
from typing import Protocol

FOLDER = "~/.cache/jaxft/xla"
"""Where compiled programs are kept, unless a run's ``train.compilation_cache`` says otherwise."""
_CHECKED = "jaxft-checked"
"""An empty file in it: what was written before its time is whole."""
_SUFFIX = "-cache"
_PIECE = 1 << 20
_ZSTD = b"\x28\xb5\x2f\xfd"


def open_cache(folder: str) -> None:
    """Turns the cache on for this process.

    jax writes entries in place, so that a process that is killed, or a full disk, leaves one that is cut off; jax would warn of it at
    each start, and never write it anew (``jax._src.lru_cache``, 0.10 to 0.12). Entries since the last start are checked, and removed
    if they are not whole.
    """
    import jax

    path = Path(folder).expanduser()
    try:
        _remove_torn(path)
    except OSError as error:  # jax goes on without the cache, too
        print(f"the compilation cache {path} cannot be checked: {error.strerror}", file=sys.stderr)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _remove_torn(folder: Path) -> None:
    """Another process may be writing an entry just now: it loses that one, which is compiled again when it is wanted."""
    if not folder.is_dir():
        return
    mark = folder / _CHECKED
    since = mark.stat().st_mtime_ns if mark.exists() else 0
    if os.access(folder, os.W_OK):
        mark.touch()  # first: what is written while this looks is looked at next time
    for entry in list(os.scandir(folder)):
        try:
            if entry.name.endswith(_SUFFIX) and entry.stat().st_mtime_ns >= since and not _is_whole(Path(entry.path)):
                os.unlink(entry.path)
        except FileNotFoundError:  # another process removed it first
            continue


def _is_whole(entry: Path) -> bool:
    """Whether a compressed file goes to its end and has the right checksum; True where it cannot be told."""
    with entry.open("rb") as file:
        head = file.read(len(_ZSTD))
        file.seek(0)
        opened = _zstd_reader() if head == _ZSTD else (zlib.decompressobj(), zlib.error)
        if opened is None:
            return True
        reader, broken = opened
        try:
            while piece := file.read(_PIECE):
                reader.decompress(piece)
        except broken:
            return False
        return reader.eof


class _Reader(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd_reader() -> tuple[_Reader, type[Exception]] | None:
    """jax compresses with Zstandard where a package for it is there."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            zstd = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return zstd.ZstdDecompressor(), zstd.ZstdError
    return None
