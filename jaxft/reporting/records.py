"""JSONL logs: records whose first key is the step they belong to, cut back to a step when a run resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jaxft.errors import UserError
from jaxft.files import JsonObject, write_atomic

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
    records = []
    for _, record in _lines_of(path):
        records.append({name: _NONFINITE.get(v, v) if isinstance(v, str) else v for name, v in record.items()})
    return records


def _lines_of(path: Path) -> list[tuple[bytes, JsonObject]]:
    """Each whole line of a log with what it says."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _record_of(line)
        if record is not None:
            found.append((line + b"\n", record))
        # What follows the last newline is empty, or was cut short by a crash. No prefix of an object is an object, so a
        # line that lacks only its newline has been taken above.
        elif number < len(lines):
            raise UserError(f"{path}:{number}: not a log record; repair the line or move the file away")
    return found


def _record_of(line: bytes) -> JsonObject | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class LineFile:
    """A JSONL file that continues at a step: later lines are dropped first, new ones are on their way at once."""

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        if path.exists():
            # A run that starts at 0 repeats everything, an evaluation at step 0 included.
            kept = [line for line, record in _lines_of(path) if step_of(record) <= start_step] if start_step else []
            content = b"".join(kept)
            if content != path.read_bytes():
                write_atomic(path, content)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def append(self, record: Mapping[str, object]) -> None:
        """Writes one record, of values as :func:`to_json` gives them."""
        # Unbuffered: a failed write leaves nothing behind that close() would try, and fail, to write again.
        rest = memoryview((json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Waits until everything is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()
