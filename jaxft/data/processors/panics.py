"""Panics of the tokenizers library become errors that can be told in one line.

Its faults inside (a pattern that is too hard for a text, a template that names a token that is not there) end in a panic: no
Exception, and Rust has written some lines on standard error before Python hears of it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PANIC = re.compile(
    rb"\n?thread '[^'\n]*'[^\n]*panicked at .*?(?:note: run with `RUST_BACKTRACE[^\n]*\n|\n(?=\n?thread ')|\Z)",
    re.DOTALL,
)


class Panic(RuntimeError):
    """The library met a fault of its own, or one of a file that it had taken without a word."""


@contextmanager
def told_as_errors() -> Iterator[None]:
    """Calls of the library in here raise :class:`Panic` instead of panicking.

    Raises:
      Panic: with the first line of what the library said.
    """
    with _HELD:
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # its module cannot be imported
                raise
            raise Panic((str(error).strip().splitlines() or ["a fault inside"])[0]) from error


def first_line(error: BaseException) -> str:
    """The first line that an error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Held:
    """Standard error, held back while the library is called, by as many threads as like to: then shown, without panics."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._real, self._kept = -1, -1

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1 and hasattr(os, "memfd_create"):
                sys.stderr.flush()
                self._real, self._kept = os.dup(2), os.memfd_create("stderr", os.MFD_CLOEXEC)
                os.dup2(self._kept, 2)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside or self._real < 0:
                return
            sys.stderr.flush()
            os.dup2(self._real, 2)
            said = os.pread(self._kept, os.fstat(self._kept).st_size, 0)
            os.close(self._kept)
            self._kept = -1
            if rest := _PANIC.sub(b"", said):
                os.write(2, rest)
            os.close(self._real)
            self._real = -1


_HELD = _Held()
