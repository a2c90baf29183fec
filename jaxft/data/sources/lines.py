"""Decoded text of files, in lines or in pieces, whatever it is packed and encoded in: gzip and Zstandard by their content, UTF-8,
and UTF-16 or UTF-32 by their marks. Files of other formats under a text file's name are named for what they are.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import sys
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING

from jaxft.errors import UserError
from jaxft.files import open_file

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Closing one closes its file.
Lines = Generator[str, None, None]
_Bytes = IO[bytes] | io.BufferedReader

_WORKBOOK = "save the sheet as CSV (UTF-8), or unpack the archive"
_FOREIGN = (
    (b"PK\x03\x04", f"a zip archive or an Excel workbook (.xlsx), not text; {_WORKBOOK}"),
    (b"PK\x05\x06", f"an empty zip archive, not text; {_WORKBOOK}"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", f"an Excel workbook (.xls), not text; {_WORKBOOK}"),
    (b"PAR1", "a Parquet file; give it the suffix .parquet"),
    (b"ARROW1", "an Arrow (Feather) file; save it as .parquet"),
    (b"SQLite format 3\x00", "an SQLite database; export the table as CSV"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it, or use gzip"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS and not the data; fetch them with: git lfs pull",
    ),
)
PACKED = (".gz", ".zst")
"""Suffixes of packed files."""
MOST_RECORD = 16 << 20
"""Bytes of a line, characters of a cell or of a value of JSON: a row that is longer is a quote or a bracket that nothing closes, or the
wrong file. A book has 5 MB."""
MOST_RATIO = 200
"""How many times as large as its file what it holds may be: texts shrink to a fifth, logs of one line to a
hundredth; the most that gzip can do is 1032, which takes a file made for it."""
FREE_BYTES = 8 << 20
"""Bytes that a file may hold whatever its size: of so little no harm comes."""
_GZIP, _ZSTD = b"\x1f\x8b", b"(\xb5/\xfd"
_PIECE = 1 << 16  # bytes of a piece of text, before they are decoded
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_lines(path: Path, *, table: bool = True) -> Lines:
    """The lines of a file, line ends included, without a byte order mark. Whoever takes them closes them: else an error elsewhere
    would leave the file open for as long as its traceback lives.

    Args:
      table: the file is to hold cells or records, so that a web page is none.

    Raises:
      UserError: the file cannot be read, is not text, or not in the encoding that it begins in.
    """
    with unpacked(path) as file:
        yield from decoded(file, str(path), table=table)


def read_pieces(path: Path) -> Lines:
    """The text of a file that is to hold records, in pieces that end anywhere; whoever takes them closes them.

    Raises:
      UserError: as :func:`read_lines`.
    """
    with unpacked(path) as file:
        first = file.read(_PIECE)
        refuse_foreign(first, str(path))
        encoding = next((encoding for mark, encoding in _MARKS if first.startswith(mark)), "utf-8-sig")
        if encoding == "utf-8-sig" and b"\x00\x00" in (first[0:4:2], first[1:4:2]):
            raise UserError(f"{path}: looks like UTF-16 without a byte order mark; save the file as UTF-8")
        decoder = codecs.getincrementaldecoder(encoding)()
        read = 0
        for raw in chain([first], iter(lambda: file.read(_PIECE), b""), [b""]):
            kept = len(decoder.getstate()[0])  # the beginning of a character, of the piece before
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                name = encoding.removesuffix("-sig").upper()
                place = f"byte {read - kept + error.start + 1}: {error.reason}"
                raise UserError(f"{path}: not valid {name} ({place}); save the file as UTF-8") from error
            read += len(raw)
            if text:
                yield text


@contextmanager
def unpacked(path: Path) -> Iterator[_Bytes]:
    """A file's bytes, as they were before it was packed."""
    damaged: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    kind = "gzip"
    try:
        with open_file(path) as file:
            first, suffix = file.read(4), path.suffix.lower()
            file.seek(0)
            if first == _ZSTD or (suffix == ".zst" and not first.startswith(_GZIP)):
                zstd = _zstd(path)
                damaged, kind = (*damaged, zstd.ZstdError), "zstd"
                with zstd.ZstdFile(file) as inner, io.BufferedReader(_Watched(inner, file, path), _PIECE) as read:
                    yield read
            elif first.startswith(_GZIP) or suffix == ".gz":
                with (
                    gzip.GzipFile(fileobj=file) as inner,
                    io.BufferedReader(_Watched(inner, file, path), _PIECE) as read,
                ):
                    yield read
            else:
                yield file
    except damaged as error:
        raise UserError(f"{path}: broken {kind} data ({error}); copy or compress the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Watched(io.RawIOBase):
    """What a packed file holds, as long as it is not out of all proportion to the file."""

    def __init__(self, unpacked: IO[bytes] | gzip.GzipFile, packed: IO[bytes], path: Path) -> None:
        self._unpacked, self._packed, self._path = unpacked, packed, path
        self._size = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """The next bytes; UserError when there are too many."""
        piece = self._unpacked.read(memoryview(buffer).nbytes)
        memoryview(buffer)[: len(piece)] = piece
        self._size += len(piece)
        check_ratio(self._size, self._packed.tell(), str(self._path))
        return len(piece)


def check_ratio(size: int, packed: int, where: str) -> None:
    """Raises UserError if what a file holds is more than text can be packed into it."""
    if size > FREE_BYTES and size > MOST_RATIO * packed:
        raise UserError(
            f"{where}: holds more than {MOST_RATIO} times its size, which no text does: it was made to fill the memory; if it is "
            "sound, unpack it"
        )


def too_long(where: str) -> UserError:
    """The error for a line, a cell or a value that does not end."""
    return UserError(
        f"{where}: is longer than the {MOST_RECORD:,} characters that a row may have; is a line end, a quote or a bracket missing?"
    )


def _zstd(path: Path) -> ModuleType:
    """Python's own module, which earlier versions have as a package."""
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError as error:
        hint = "pip install jaxft[zstd], or unpack it (zstd -d)"
        raise UserError(f"{path}: is compressed with zstd, which needs a package ({error}); {hint}") from error


def decoded(file: _Bytes, where: str, *, table: bool = False) -> Lines:
    """The lines of an open file; see :func:`read_lines`."""
    first = file.readline(MOST_RECORD + 1)
    refuse_foreign(first, where, table=table)
    encoding = next((encoding for mark, encoding in _MARKS if first.startswith(mark)), None)
    if encoding is not None:
        yield from _wide(file, first, encoding, where)
        return
    if table and b"\x00\x00" in (first[0:4:2], first[1:4:2]):
        raise UserError(f"{where}: looks like UTF-16 without a byte order mark; save the file as UTF-8")
    following = iter(partial(file.readline, MOST_RECORD + 1), b"")
    for number, raw in enumerate(chain([first] if first else [], following), start=1):
        if len(raw) > MOST_RECORD:
            raise too_long(f"{where}:{number}")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}:{number}: not valid UTF-8 (byte {error.start + 1} of the line: {error.reason}); "
                "save the file as UTF-8"
            ) from error
        yield line.removeprefix("\ufeff") if number == 1 else line


def refuse_foreign(first: bytes, where: str, *, table: bool = True) -> None:
    """Raises UserError if a file that begins with ``first`` is of a format that is known not to be text."""
    for magic, what in _FOREIGN:
        if first.startswith(magic):
            raise UserError(f"{where}: is {what}")
    if first.startswith(b"BZh") and first[4:10] == b"1AY&SY":
        raise UserError(f"{where}: is compressed with bzip2; unpack it, or use gzip")
    if table and first.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{where}: is a web page and not the data; was a download refused?")


def _wide(file: _Bytes, first: bytes, encoding: str, where: str) -> Lines:
    decoder = codecs.getincrementaldecoder(encoding)()
    parts: list[str] = []  # of the line that is not yet whole
    number = 1
    try:
        # Cut at bytes that may, or may not, be line ends.
        for raw in chain([first], iter(partial(file.readline, _PIECE), b""), [b""]):
            *ended, rest = decoder.decode(raw, final=not raw).split("\n")
            for line in ended:
                yield "".join([*parts, line, "\n"])
                parts, number = [], number + 1
            parts.append(rest)
            if len(parts) > MOST_RECORD // _PIECE and sum(map(len, parts)) > MOST_RECORD:
                raise too_long(f"{where}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}:{number}: begins as {encoding.upper()}, but is not valid ({error.reason}); save the file as UTF-8"
        ) from error
    if last := "".join(parts):
        yield last
