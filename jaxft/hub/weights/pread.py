"""One open file, read at positions by any number of threads.

Why not mmap: mapped pages count in the resident set beside the arrays they are copied to, so that loading would peak at
twice the size of the weights. `preadv` copies from the page cache straight into the destination.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from jaxft.errors import UserError

_MOST_PER_CALL = 1 << 30  # Linux moves at most 0x7ffff000 bytes per call


class RandomAccessFile:
    """A file descriptor and its size; `read_at` has no shared position, so threads need no lock."""

    def __init__(self, path: Path) -> None:
        # Asked before opening: opening a FIFO would wait for a writer for ever.
        if not path.is_file():
            raise UserError(f"{path} is missing or is not a regular file; name a weights file or a folder that has one")
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}; check its permissions") from error
        self.size = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, out: np.ndarray) -> None:
        """Fills ``out`` (C-contiguous, any dtype) with the bytes from ``offset`` on."""
        if self._descriptor < 0:
            raise ValueError(f"{self.path} is closed")
        rest = out.reshape(-1).view(np.uint8).data
        while rest:
            try:
                count = os.preadv(self._descriptor, [rest[:_MOST_PER_CALL]], offset)
            except OSError as error:
                raise UserError(f"cannot read {self.path}: {error.strerror}; check the disk or the mount") from error
            if count == 0:
                raise UserError(f"{self.path} is truncated: it ends at byte {offset}; download or copy it again")
            offset, rest = offset + count, rest[count:]

    def bytes_at(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on: for headers."""
        out = np.empty(count, np.uint8)
        self.read_at(offset, out)
        return out.tobytes()

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
