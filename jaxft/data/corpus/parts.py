"""How sources are divided into parts, which follows from the sources alone, and the documents of a part."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, NamedTuple

from jaxft.data.corpus.options import Options
from jaxft.data.sources.lines import MOST_RECORD, PACKED, refuse_foreign, too_long, unpacked
from jaxft.data.sources.listing import suffix_of
from jaxft.data.sources.parquet_footer import group_sizes
from jaxft.data.sources.read import check_unpacked, files_of, iter_rows, parquet_errors
from jaxft.data.sources.rows import json_object, record_row
from jaxft.data.sources.table import Form
from jaxft.errors import UserError
from jaxft.files import JsonObject

_LINES = (".jsonl", ".jsonlines", ".ndjson")
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's begin with them, or with two zeros
_READ = 1 << 22


@dataclass(frozen=True)
class Piece:
    """A stretch of a source."""

    source: str
    """A file, or ``tfds:`` and the like."""
    size: int
    """Bytes of the whole file; of what is no file, of all its files."""
    start: int = 0
    """The first byte, or row group; lines belong to the piece that they begin in."""
    stop: int | None = None
    """The one after the last; None: to the end."""
    named: int = 0
    """Which of the sources that the command names it is of."""

    def shown(self) -> str:
        """The piece as messages name it."""
        return self.source if self.stop is None else f"{self.source} (from {self.start} to {self.stop})"


Part = tuple[Piece, ...]
"""What is tokenised in one go, to one shard."""


@dataclass
class Counts:
    """What happened to the documents of a part."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, where: str | None = None, number: int = 1) -> None:
        """Counts something, and keeps where it was first seen."""
        self.counts[what] = self.counts.get(what, 0) + number
        if where is not None:
            self.places.setdefault(what, where)


class Document(NamedTuple):
    """A text, and where it stands."""

    text: str
    where: str
    named: int = 0
    """Which of the sources that the command names it is of."""


def divide(sources: Sequence[str], options: Options) -> list[Part]:
    """The parts of sources, in order: about ``options.part_bytes`` each, as far as their formats can be read from the middle.

    Raises:
      UserError: there is nothing to read there.
    """
    parts: list[Part] = []
    held: list[Piece] = []
    size = 0
    found = (
        replace(piece, named=number) for number, source in enumerate(sources) for piece in _pieces(source, options)
    )
    for piece in found:
        weight = (piece.size if piece.stop is None else piece.stop - piece.start) if not _is_groups(piece) else 0
        # Small files share a part; one that could be divided has parts of its own.
        if held and (size + weight > options.part_bytes or piece.stop is not None or held[-1].stop is not None):
            parts.append(tuple(held))
            held, size = [], 0
        held.append(piece)
        size += weight
    if held:
        parts.append(tuple(held))
    return parts


def _is_groups(piece: Piece) -> bool:
    return suffix_of(piece.source) == ".parquet"


def _pieces(source: str, options: Options) -> Iterator[Piece]:
    if source == "-":
        raise UserError(
            "data build -: standard input can be read once only, and a killed build begins anew; name a file"
        )
    if source.startswith(("tfds:", "hf:")):
        yield Piece(source, sum(path.stat().st_size for path in files_of(source)))
        return
    for path in files_of(source):
        suffix, size = suffix_of(path), path.stat().st_size
        if suffix == ".parquet":
            yield from _row_groups(path, size, options)
        elif size <= options.part_bytes or not _divisible(path, suffix, options):
            yield Piece(str(path), size)
        else:
            for start in range(0, size, options.part_bytes):
                yield Piece(str(path), size, start, min(start + options.part_bytes, size))


def _divisible(path: Path, suffix: str, options: Options) -> bool:
    """Whether a file can be read from the middle: lines, each a document."""
    if suffix not in (*_LINES, ".txt") or path.suffix.lower() in PACKED:
        return False
    if suffix == ".txt" and options.documents != "line":
        return False
    with open(path, "rb") as file:
        first = file.read(4)
    return not (first.startswith((*_WIDE, b"\0\0", b"\x1f\x8b", b"(\xb5/\xfd")))


def _row_groups(path: Path, size: int, options: Options) -> Iterator[Piece]:
    check_unpacked(path)
    sizes = [group.size for group in group_sizes(path)]
    start = held = 0
    for number, bytes_of in enumerate(sizes):
        if held and held + bytes_of > options.part_bytes:
            yield Piece(str(path), size, start, number)
            start, held = number, 0
        held += bytes_of
    yield Piece(str(path), size, start, len(sizes))


def said_of(parts: Iterable[Part]) -> list[list[JsonObject]]:
    """Parts as plain JSON; which source each piece is of follows from the sources."""
    return [
        [{name: value for name, value in asdict(piece).items() if name != "named"} for piece in part] for part in parts
    ]


def source_hash(part: Part) -> str:
    """A hash of the bytes that a part is read from; of Parquet, of the whole file."""
    found = hashlib.sha256()
    for piece in part:
        whole = _is_groups(piece) or piece.stop is None
        for path in files_of(piece.source) if piece.source.startswith(("tfds:", "hf:")) else [Path(piece.source)]:
            with open(path, "rb") as file:
                file.seek(0 if whole else piece.start)
                left = path.stat().st_size if whole or piece.stop is None else piece.stop - piece.start
                while left > 0 and (block := file.read(min(_READ, left))):
                    found.update(block)
                    left -= len(block)
    return found.hexdigest()


def times_of(part: Part) -> list[int]:
    """When each file of a part was changed last, in ns."""
    return [Path(piece.source).stat().st_mtime_ns for piece in part if not piece.source.startswith(("tfds:", "hf:"))]


def check_sizes(part: Part) -> None:
    """Raises UserError if a file of a part is gone, or has another size than when the build was begun."""
    for piece in part:
        if piece.source.startswith(("tfds:", "hf:")):
            continue
        path = Path(piece.source)
        found = path.stat().st_size if path.is_file() else None
        if found != piece.size:
            what = "is gone" if found is None else f"has changed ({found} bytes, not {piece.size})"
            raise UserError(f"{path}: {what} since this build was begun; put it back, or remove --out and build again")


def documents_of(part: Part, options: Options, counts: Counts, note: Callable[[str], None]) -> Iterator[Document]:
    """The texts of a part that are not empty, in order.

    Raises:
      UserError: when what shows it is reached.
    """
    for piece in part:
        for document in _documents(piece, options, counts, note):
            if document.text and not document.text.isspace():
                yield document._replace(named=piece.named)
            else:
                counts.add("empty", document.where)


def _documents(piece: Piece, options: Options, counts: Counts, note: Callable[[str], None]) -> Iterator[Document]:
    suffix, path = suffix_of(piece.source), Path(piece.source)
    if suffix in (*_LINES, ".txt") and not piece.source.startswith(("tfds:", "hf:")) and not _is_wide(path):
        with unpacked(path) as file:
            lines = _decoded(_raw_lines(file, piece), piece.source, options, counts)
            if suffix == ".txt":
                yield from _grouped(lines, options, piece.source)
            else:
                yield from _of_json(lines, piece.source, options, counts)
        return
    if suffix == ".parquet":
        values = _parquet(piece, options)
    else:
        form = Form(options.header, options.quotes, note)
        values = ((row.values[0], row.where) for row in iter_rows(piece.source, (options.text,), form))
    for value, where in values:
        yield from _checked(value, where, options, counts)


def _is_wide(path: Path) -> bool:
    with open(path, "rb") as file:
        first = file.read(4)
    return first.startswith(_WIDE) or first == codecs.BOM_UTF32_BE


def _checked(value: object, where: str, options: Options, counts: Counts) -> Iterator[Document]:
    if value is None or (isinstance(value, float) and value != value):
        if options.missing_text == "refuse":
            raise UserError(
                f"{where}: column {options.text!r} has no text; fill it in, or leave such rows out: data.missing_text=skip"
            )
        counts.add("missing", where)
        return
    if not isinstance(value, str):
        raise UserError(f"{where}: column {options.text!r} holds a {type(value).__name__}, not a text; set data.text")
    yield Document(value, where)


def _raw_lines(file: IO[bytes], piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(byte that it begins at, line) of the lines that begin in a piece."""
    at = piece.start
    if at:
        # The line before may end right here.
        file.seek(at - 1)
        at += len(file.readline(MOST_RECORD + 1)) - 1
    while piece.stop is None or at < piece.stop:
        line = file.readline(MOST_RECORD + 1)
        if not line:
            return
        if len(line) > MOST_RECORD:
            raise too_long(f"{piece.source} byte {at}")
        if at == 0:
            refuse_foreign(line, piece.source, table=False)
        yield at, line
        at += len(line)


def _decoded(
    lines: Iterable[tuple[int, bytes]], source: str, options: Options, counts: Counts
) -> Iterator[tuple[int, str]]:
    """(byte that it begins at, text) of lines; what is not UTF-8 is dealt with as the options say."""
    for at, raw in lines:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"{source} byte {at + error.start}"
            if options.invalid_utf8 == "refuse":
                raise UserError(
                    f"{place}: not valid UTF-8 ({error.reason}); correct it, or choose --invalid-utf8 replace or skip"
                ) from error
            counts.add("invalid_utf8", place)
            if options.invalid_utf8 == "skip":
                continue
            text = raw.decode("utf-8", "replace")
        yield at, text.removeprefix("\ufeff") if at == 0 else text


def _grouped(lines: Iterable[tuple[int, str]], options: Options, source: str) -> Iterator[Document]:
    """Lines as documents: each, those between blank lines, or all of a file."""
    if options.documents == "line":
        for at, line in lines:
            yield Document(line.removesuffix("\n").removesuffix("\r"), f"{source} byte {at}")
        return
    held: list[str] = []
    begin = size = 0
    for at, line in lines:
        if options.documents == "paragraph" and line.isspace():
            if held:
                yield Document("".join(held).rstrip("\r\n"), f"{source} byte {begin}")
            held, size = [], 0
            continue
        if not held:
            begin = at
        held.append(line)
        size += len(line)
        if size > MOST_RECORD:
            raise too_long(f"{source} byte {begin}")
    if held:
        yield Document("".join(held).rstrip("\r\n"), f"{source} byte {begin}")


def _of_json(lines: Iterable[tuple[int, str]], source: str, options: Options, counts: Counts) -> Iterator[Document]:
    for at, line in lines:
        if line.isspace():
            continue
        where = f"{source} byte {at}"
        row = record_row(json_object(line, where), (options.text,), where)
        yield from _checked(row.values[0], where, options, counts)


def _parquet(piece: Piece, options: Options) -> Iterator[tuple[object, str]]:
    from pyarrow.parquet import ParquetFile

    groups = range(piece.start, piece.stop or 0)
    try:
        with ParquetFile(piece.source) as file:
            names = file.schema_arrow.names
            if options.text not in names:
                next(iter(iter_rows(piece.source, (options.text,))))  # says which columns there are
            number = sum(group.rows for group in group_sizes(Path(piece.source))[: piece.start])
            for batch in file.iter_batches(batch_size=1024, columns=[options.text], row_groups=list(groups)):
                for value in batch.column(0).to_pylist():
                    yield value.decode("utf-8") if isinstance(value, bytes) else value, f"{piece.source} row {number}"
                    number += 1
    except parquet_errors() as error:
        raise UserError(f"{piece.source}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error
