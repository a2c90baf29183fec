"""A token cache: the encoded rows of a split on disk, written once in flat memory, and read through a memory map.

A run on a cache reads the same batches as one that encodes its rows itself: :class:`Cache` is a split whose arrays are the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from jaxft.data.batch import Field, Fields
from jaxft.data.cache_files import (
    AGAIN,
    DROPPED,
    ArraySaid,
    FileSaid,
    Stored,
    column_file,
    hashes,
    offsets_file,
    read_manifest,
    remove_cache,
    sync,
    write_manifest,
)
from jaxft.data.examples import Encoded, Split, ragged_axis
from jaxft.errors import UserError, listed
from jaxft.files import JsonObject

_BUFFERED = 1 << 18  # values of a column that are held until they are written
_COPIED = 1 << 20  # values that are copied together where a column needs a wider type
_NARROW = tuple(map(np.dtype, ("u1", "i1", "<u2", "<i2", "<u4", "<i4")))


@dataclass(frozen=True, eq=False)
class Cache(Split):
    """Encoded rows in files. Their hash is known from when they were written; nothing is read before it is asked for."""

    folder: Path = Path()
    made: Mapping[str, object] = field(default_factory=dict)
    """What the rows were made of and by, by dotted name."""
    about: JsonObject = field(default_factory=dict)
    """What else whoever wrote it had to say: ``rows``, how many rows the examples are of, and more."""
    known_digest: str = ""

    @property
    def rows(self) -> int:
        """Rows that the examples are of."""
        return self.about["rows"]

    def digest(self) -> str:
        """A hash of all examples, in order: that of the same examples in memory."""
        return self.known_digest


def open_cache(folder: Path, name: str, fields: Fields) -> Cache:
    """The rows of a cache.

    Args:
      name: what messages call the split.
      fields: of the batches that are to be made of it.

    Raises:
      UserError: there is no whole cache, or it stores other fields.
    """
    body = read_manifest(folder)
    stored, offsets = body["columns"], body["offsets"]
    for key, said in stored.items():
        if key not in fields or list(fields[key].axes) != said.get("axes"):
            raise UserError(f"{folder}: its field {key!r} is none of this task's ({listed(fields)}); {AGAIN}")
    lacking = [key for key, kind in fields.items() if kind.value is None and key not in stored]
    if lacking:
        raise UserError(f"{folder}: it has no {listed(lacking)}, which this task's batches need; {AGAIN}")
    return Cache(
        name,
        {key: kind for key, kind in fields.items() if key in stored or kind.value is not None},
        {key: _array(said).opened(folder) for key, said in stored.items()},
        {axis: _array(said).opened(folder) for axis, said in offsets.items()},
        _array(body["dropped"]).opened(folder),
        folder,
        body["made"],
        body["about"],
        body["digest"],
    )


def _array(said: ArraySaid) -> Stored:
    return Stored(said["file"], said["dtype"], tuple(said["shape"]))


def check_made(
    folder: Path, made: Mapping[str, object], wanted: Mapping[str, object], shown: Mapping[str, str]
) -> None:
    """Raises UserError if a cache was made otherwise than wanted: names the first difference.

    Args:
      made: by dotted name, what the manifest says; see :attr:`Cache.made`.
      wanted: likewise.
      shown: what messages say instead of a value, for those that are hashes.
    """
    otherwise = "give what it was made with, or build another: jaxft cache build"
    for key in dict.fromkeys((*wanted, *made)):
        was, now = (repr(values[key]) if key in values else "not set" for values in (made, wanted))
        if was == now:
            continue
        if key in shown:
            raise UserError(f"{folder}: {shown[key]}; {otherwise}")
        raise UserError(f"{folder}: a token cache made with {key}={was}, here it is {now}; {otherwise}")


@contextmanager
def begun(folder: Path) -> Iterator[None]:
    """A folder to write a cache into; if the block fails, nothing is left of it.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        remove_cache(folder)
        # What is read beside has a name, a full disk has none.
        if isinstance(error, OSError) and (error.filename is None or folder in Path(str(error.filename)).parents):
            raise UserError(f"{folder}: cannot be written: {error.strerror}; nothing is left of it") from error
        raise


def write_cache(
    folder: Path,
    encoded: Iterable[Encoded],
    fields: Fields,
    made: Mapping[str, object],
    about: Callable[[Split], Mapping[str, object]],
    highest: Mapping[str, int] | None = None,
) -> None:
    """Writes encoded rows as they come; they are a cache when the call is over.

    Args:
      fields: that its batches may have: those that the examples store, and those with a ``value`` of their own.
      made: what the rows are made of and by, plain JSON by dotted name.
      about: of the examples as they were written, what else is to be kept, plain JSON; ``rows``, how many rows they are of.
      highest: the largest id that fields may have, where it is known; such a field is not written anew when one shows up.

    Raises:
      UserError: there are no rows, or they cannot be written.
    """
    with begun(folder):
        columns, dropped, ends = _written(folder, encoded, fields, highest or {})
        stored = {name: column.stored() for name, column in columns.items()}
        offsets = {axis: column.stored() for axis, column in ends.items()}
        split = Split(
            folder.name,
            {name: kind for name, kind in fields.items() if name in stored or kind.value is not None},
            {name: array.opened(folder) for name, array in stored.items()},
            {axis: array.opened(folder) for axis, array in offsets.items()},
        )
        said = dict(about(split))
        del split
        files, digest = _hashed(folder, [*offsets.values(), *stored.values()], fields)
        cut = dropped.stored()
        files |= _hashed(folder, [cut], {})[0]
        body = {
            "examples": cut.shape[0],
            "columns": {name: _said(array) | {"axes": list(fields[name].axes)} for name, array in stored.items()},
            "offsets": {axis: _said(array) for axis, array in offsets.items()},
            "dropped": _said(cut),
            "made": dict(made),
            "about": said,
            "digest": digest,
            "files": files,
        }
        write_manifest(folder, body)


def _said(array: Stored) -> ArraySaid:
    return {"file": array.file, "dtype": array.dtype, "shape": list(array.shape)}


def _hashed(folder: Path, arrays: list[Stored], fields: Fields) -> tuple[dict[str, FileSaid], str]:
    """Size and hashes of each file, and one hash of all as the arrays would be in memory: that of :meth:`Split.digest`."""
    whole, files = hashlib.sha256(), {}
    for array in arrays:
        name = array.file.removeprefix("column-").removesuffix(".bin")
        wide = np.dtype(fields[name].dtype if array.file == column_file(name) else array.dtype)
        digests = []
        for block, digest in hashes(folder / array.file):
            whole.update(np.frombuffer(block, array.dtype).astype(wide, copy=False).data)
            digests.append(digest)
        sync(folder / array.file)
        files[array.file] = {"size": array.size, "sha256": digests}
    return files, whole.hexdigest()


def _written(
    folder: Path, encoded: Iterable[Encoded], fields: Fields, highest: Mapping[str, int]
) -> tuple[dict[str, _Column], _Column, dict[str, _Column]]:
    """Columns by field, tokens cut off and offsets by axis, written."""
    made = _Columns(folder, fields, highest)
    try:
        for one in encoded:
            made.add(one)
        made.close()
    except BaseException:
        made.abandon()
        raise
    if not made.columns:
        raise UserError(f"{folder}: there is no row to write")
    return made.columns, made.dropped, made.ends


class _Columns:
    """The files of a cache while it is written. Which fields it has shows at the first example."""

    def __init__(self, folder: Path, fields: Fields, highest: Mapping[str, int]) -> None:
        self._folder, self._fields, self._highest = folder, fields, highest
        self.columns: dict[str, _Column] = {}
        self.ends: dict[str, _Column] = {}
        self._at: dict[str, int] = {}
        self.dropped = _Column(folder / DROPPED, _COUNTS, 0)

    def add(self, one: Encoded) -> None:
        """Appends an example."""
        if not self.columns:
            self._begin([name for name in self._fields if name in one.example])
        sizes: dict[str, int] = {}
        for name, column in self.columns.items():
            value = np.asarray(one.example[name])
            if column.axis is None:
                column.add(value[None])
                continue
            column.add(value)
            if sizes.setdefault(column.axis, len(value)) != len(value):
                raise ValueError(f"{name}: {len(value)} values along {column.axis}, other fields {sizes[column.axis]}")
        for axis, size in sizes.items():
            self._at[axis] += size
            self.ends[axis].add(np.array([self._at[axis]], np.int64))
        self.dropped.add(np.array([one.dropped], np.int64))

    def _begin(self, names: list[str]) -> None:
        for name in names:
            kind = self._fields[name]
            axis = ragged_axis(kind)
            if axis is not None and axis not in self.ends:
                self.ends[axis] = _Column(self._folder / offsets_file(axis), _COUNTS, _FAR)
                self.ends[axis].add(np.zeros(1, np.int64))
                self._at[axis] = 0
            self.columns[name] = _Column(self._folder / column_file(name), kind, self._highest.get(name, 0))

    def _all(self) -> tuple[_Column, ...]:
        return *self.columns.values(), *self.ends.values(), self.dropped

    def close(self) -> None:
        """Writes what is held."""
        for column in self._all():
            column.close()

    def abandon(self) -> None:
        """Closes the files as they are."""
        for column in self._all():
            column.abandon()


_COUNTS = Field(("batch",), "int64")
_FAR = 1 << 40  # offsets are int64 from the beginning


class _Column:
    """A flat file that values are appended to, integers in the narrowest type that holds all of them."""

    def __init__(self, path: Path, field: Field, highest: int) -> None:
        self._path, self.axis = path, ragged_axis(field)
        self._inner = tuple(field.axes[1:] if self.axis is None else field.axes[2:])
        if any(isinstance(axis, str) for axis in self._inner):
            raise UserError(
                f"{path.stem}: a field that is ragged along {listed(map(str, field.axes))} cannot be cached"
            )
        self._field = np.dtype(field.dtype).newbyteorder("<")
        self._low, self._high = 0, highest
        self._dtype = self._narrowest()
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._held: list[np.ndarray] = []
        self._count = self._waiting = 0

    def add(self, values: np.ndarray) -> None:
        """Appends [n, ...] values."""
        self._held.append(values)
        self._waiting += values.size
        # Short arrays cost as much as a hundred values.
        if self._waiting >= _BUFFERED or len(self._held) >= _BUFFERED // 64:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        values = np.concatenate(self._held).astype(self._field, copy=False)
        self._held, self._waiting = [], 0
        if values.size and values.dtype.kind in "iu":
            self._low, self._high = min(self._low, int(values.min())), max(self._high, int(values.max()))
            if (wanted := self._narrowest()) != self._dtype:
                self._widen(wanted)
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._count += len(values)

    def _narrowest(self) -> np.dtype:
        if self._field.kind not in "iu":
            return self._field
        fitting = (kind for kind in _NARROW if kind.itemsize < self._field.itemsize and self._fits(kind))
        return next(fitting, self._field)

    def _fits(self, kind: np.dtype) -> bool:
        limits = np.iinfo(kind)
        return limits.min <= self._low and self._high <= limits.max

    def _widen(self, wanted: np.dtype) -> None:
        """Writes what there is anew, in a wider type."""
        self._file.close()
        wide = self._path.with_name(f"{self._path.name}.wide")
        with open(self._path, "rb") as old, open(wide, "wb") as new:
            while block := old.read(_COPIED * self._dtype.itemsize):
                new.write(np.frombuffer(block, self._dtype).astype(wanted).data)
        wide.replace(self._path)
        self._file = open(self._path, "ab")  # noqa: SIM115
        self._dtype = wanted

    def close(self) -> None:
        """Writes what is held."""
        self._flush()
        self._file.close()

    def abandon(self) -> None:
        """Leaves the file as it is."""
        self._held = []
        with suppress(OSError):  # what it still buffers finds no room either
            self._file.close()

    def stored(self) -> Stored:
        """What was written."""
        inner = tuple(int(axis) for axis in self._inner)
        return Stored(self._path.name, self._dtype.str, (self._count, *inner))
