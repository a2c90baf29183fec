"""JSONL logs: records whose first key is the step they belong to, cut back to a step when a run resumes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jaxft.errors import StorageError, UserError, not_written
from jaxft.files import JsonObject, write_atomic

Mark = tuple[int, int, str]
"""A beginning of a log: the step of its last line, its bytes, its sha256."""
_MARKS = 64
"""Most beginnings that are kept."""
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_json(value: object) -> Any:
    """``value`` as what strict JSON can hold: numpy scalars as Python's, non-finite floats as "nan", "inf", "-inf".

    JSON has no non-finite numbers (Python would write the bare words, which other readers refuse), and null would not
    tell an overflow from a NaN.
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return str(plain)
    return plain if not isinstance(plain, list) else to_json(plain)


def step_of(record: Mapping[str, float | str]) -> int:
    """The step that a record belongs to."""
    return cast(int, record["step"])


def read_log(path: Path) -> list[JsonObject]:
    """The records of a ``log.jsonl`` or ``timing.jsonl``, non-finite values as floats again.

    A last line that a crash cut short is left out.

    Raises:
      UserError: the file cannot be read, or another line of it is not a record.
    """
    try:
        lines, bad = _lines_of(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if bad:
        raise UserError(f"{path}:{bad[0]}: not a log record; repair the line or move the file away")
    return [
        {name: _NONFINITE.get(v, v) if isinstance(v, str) else v for name, v in record.items()} for _, record in lines
    ]


def _lines_of(raw: bytes) -> tuple[list[tuple[bytes, JsonObject]], list[int]]:
    """Each whole line of a log with what it says, and the numbers of lines that are not records."""
    found, bad = [], []
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _record_of(line)
        if record is not None:
            found.append((line + b"\n", record))
        # What follows the last newline is empty, or was cut short by a crash. No prefix of an object is an object, so a
        # line that lacks only its newline has been taken above.
        elif number < len(lines):
            bad.append(number)
    return found, bad


def _record_of(line: bytes) -> JsonObject | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class Written:
    """What a log should hold so far: its length and hash, and those of some of its beginnings.

    All of it follows from the lines alone, so that a run that was stopped and resumed has the same.
    """

    def __init__(self) -> None:
        self._hash, self._bytes, self._lines, self._stride = hashlib.sha256(), 0, 0, 1
        self._marks: list[Mark] = []

    def add(self, line: bytes, step: int) -> None:
        """Counts a line, newline included."""
        self._hash.update(line)
        self._bytes, self._lines = self._bytes + len(line), self._lines + 1
        if self._lines % self._stride == 0:
            self._marks.append((step, self._bytes, self._hash.hexdigest()))
        if len(self._marks) > _MARKS:
            self._marks, self._stride = self._marks[1::2], 2 * self._stride

    def said(self) -> JsonObject:
        """Plain JSON, for :func:`log_said`."""
        marks = [list(mark) for mark in self._marks]
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest(), "marks": marks}


def log_said(path: Path, written: Mapping[str, Any] | None, step: int) -> str | None:
    """What is wrong with the log of a run that goes on; None: it is as it was when its checkpoint was saved.

    Args:
      written: as :meth:`Written.said` gave it at that time; None for checkpoints of versions that did not store it.
      step: of the checkpoint.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return f"warning: {path} is missing: it begins anew after step {step}; the parameters are whole"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if written is None or hashlib.sha256(raw[: written["bytes"]]).hexdigest() == written["sha256"]:
        return None
    running, at, whole = hashlib.sha256(), 0, 0
    for mark_step, size, digest in written["marks"]:
        running.update(raw[at:size])
        at = size
        if running.hexdigest() != digest:
            break
        whole = mark_step
    short = len(raw) < written["bytes"]
    what = f"has {len(raw):,} of {written['bytes']:,} bytes" if short else "is not what was written"
    where = f"up to step {whole}, and" if whole else "only"
    return f"warning: {path} {what}: it is whole {where} after step {step}; the parameters are whole, training goes on"


class LineFile:
    """A JSONL file that continues at a step: later lines are dropped first, new ones are on their way at once."""

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        self.warnings: list[str] = []
        """What is to be said of the file as it was found."""
        self._written = Written()
        if path.exists():
            self._cut(path.read_bytes(), start_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def _cut(self, content: bytes, start_step: int) -> None:
        lines, bad = _lines_of(content)
        if bad:
            copy = self._path.with_name(f"{self._path.name}.damaged")
            write_atomic(copy, content)
            self.warnings.append(
                f"warning: {self._path}: {len(bad)} of its lines are no records (line {bad[0]} is the first): left out; "
                f"the file as it was is {copy.name}"
            )
        # A run that starts at 0 repeats everything, an evaluation at step 0 included.
        kept = [(line, record) for line, record in lines if step_of(record) <= start_step] if start_step else []
        if lines and not start_step:
            last = step_of(lines[-1][1])
            self.warnings.append(f"{self._path} of a run that stored no step (it got to step {last}) is written anew")
        for line, record in kept:
            self._written.add(line, step_of(record))
        if (whole := b"".join(line for line, _ in kept)) != content:
            write_atomic(self._path, whole)

    def written(self) -> JsonObject:
        """What the file should hold from now on, for a checkpoint to keep."""
        return self._written.said()

    def append(self, record: Mapping[str, object]) -> None:
        """Writes one record, of values as :func:`to_json` gives them."""
        # Unbuffered: a failed write leaves nothing behind that close() would try, and fail, to write again.
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        rest = memoryview(line)
        self._check_there()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise not_written(self._path, error) from error
        self._written.add(line, cast(int, record["step"]))

    def sync(self) -> None:
        """Waits until everything is on the disk."""
        self._check_there()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise not_written(self._path, error) from error

    def _check_there(self) -> None:
        # Writing to a file that has been removed succeeds, and is lost.
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise StorageError(f"{self._path} was removed while the run wrote to it; the run ends")

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()
