"""What a Parquet file says of its sizes, read from its footer (Thrift's compact protocol, github.com/apache/parquet-format).

pyarrow tells the same, but ends the whole process where other parts of a footer are damaged (seen with 26.0); it reads such files with an
error that can be told.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jaxft.errors import UserError

_MAGIC = b"PAR1"
_MOST_BYTES = 64 << 20
_MOST_DEPTH = 32
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_NUMBERS = (4, 5, 6)
_ROW_GROUPS = 4  # of FileMetaData
_COLUMNS, _GROUP_BYTES, _GROUP_ROWS = 1, 2, 3  # of RowGroup
_META = 3  # of ColumnChunk
_VALUES, _UNPACKED = 5, 6  # of ColumnMetaData


class GroupSize(NamedTuple):
    """A row group."""

    size: int
    """Bytes, unpacked."""
    rows: int
    values: int
    """How many its longest column has."""


def group_sizes(path: Path) -> list[GroupSize]:
    """The sizes of a file's row groups, as it says.

    Raises:
      UserError: its footer cannot be read.
    """
    try:
        said = _Reader(_footer(path)).struct()
        return [_size_of(group) for group in _listed(said.get(_ROW_GROUPS))]
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: its footer is damaged; write it again") from error


def _footer(path: Path) -> bytes:
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 8))
        last = file.read(8)
        length = int.from_bytes(last[:4], "little")
        if last[4:] != _MAGIC or not 0 < length <= min(end - 12, _MOST_BYTES):
            raise ValueError("no footer")
        file.seek(end - 8 - length)
        return file.read(length)


def _size_of(group: object) -> GroupSize:
    columns = [_struct(_struct(column).get(_META, {})) for column in _listed(_struct(group).get(_COLUMNS))]
    size = max(_number(_struct(group), _GROUP_BYTES), sum(_number(column, _UNPACKED) for column in columns))
    rows = _number(_struct(group), _GROUP_ROWS)
    return GroupSize(size, rows, max([rows, *(_number(column, _VALUES) for column in columns)]))


def _struct(value: object) -> dict[int, object]:
    if not isinstance(value, dict):
        raise TypeError("expected a struct")
    return value


def _listed(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("expected a list")
    return value


def _number(struct: dict[int, object], field: int) -> int:
    value = struct.get(field, 0)
    if not isinstance(value, int) or value < 0:
        raise TypeError("expected a size")
    return value


class _Reader:
    """Values one after the other; IndexError at the end of the bytes."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at, self._depth = raw, 0, 0

    def struct(self) -> dict[int, object]:
        """Fields by number."""
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise ValueError("too deep")
        found: dict[int, object] = {}
        number = 0
        while (head := self._byte()) != 0:
            kind, step = head & 15, head >> 4
            number = number + step if step else self._zigzag()
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        self._depth -= 1
        return found

    def _value(self, kind: int) -> object:
        if kind in _NUMBERS:
            return self._zigzag()
        if kind in (_BYTE, _TRUE, _FALSE):  # booleans of a list have a byte each
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._varint()
            return [self._value(head & 15) for _ in range(self._few(count))]
        if kind == _MAP:
            count = self._few(self._varint())
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct()
        raise ValueError("unknown kind")

    def _few(self, count: int) -> int:
        """A number of items, each of which takes a byte at least."""
        if count > len(self._raw) - self._at:
            raise ValueError("too many")
        return count

    def _byte(self) -> int:
        self._at += 1
        return self._raw[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        self._at += self._few(count)
        return self._raw[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("too long a number")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
