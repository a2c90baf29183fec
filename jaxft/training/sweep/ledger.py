"""What a sweep has done so far: a file of JSON Lines that only grows, each line on the disk before the sweep goes on.

The first line says what the sweep is. ``begun`` says that a trial has a folder, ``finished`` what came of it. Whenever the process
dies, each trial is finished, or begun (its folder may hold a checkpoint to go on from), or neither.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxft.errors import UserError
from jaxft.files import JsonObject, fsync_folder
from jaxft.reporting.records import to_json

NAME = "sweep.jsonl"
FORMAT = 1
State = Literal["done", "pruned", "diverged"]


@dataclass(frozen=True)
class Finished:
    """What came of a trial."""

    point: int
    seed: int
    state: State
    value: float | None
    """The best value of the metric that the sweep ranks by; None: no evaluation had a finite one."""
    best_step: int
    steps: int
    metrics: Mapping[str, float]
    """Scores of the best step."""
    course: tuple[tuple[int, float], ...]
    """(step, value) of each evaluation."""
    rows: str
    """Hashes of the training rows and the held-out rows."""


@dataclass
class Ledger:
    """An open ledger; one process has it at a time."""

    head: JsonObject
    finished: dict[tuple[int, int], Finished] = field(default_factory=dict)
    """By number of the point, and seed."""
    begun: set[tuple[int, int]] = field(default_factory=set)
    points: dict[int, dict[str, str]] = field(default_factory=dict)
    """The points that were begun, by number."""
    _descriptor: int = -1

    def begin(self, point: int, seed: int, values: Mapping[str, str]) -> None:
        """Notes that a trial begins; nothing if it has begun before."""
        if (point, seed) not in self.begun:
            self._append({"kind": "begun", "point": point, "seed": seed, "values": dict(values)})
            self.begun.add((point, seed))
            self.points[point] = dict(values)

    def finish(self, result: Finished) -> None:
        """Notes what came of a trial."""
        if (result.point, result.seed) in self.finished:
            raise ValueError(f"trial {result.point} of seed {result.seed} was finished before")
        self._append({"kind": "finished", **_plain(result)})
        self.finished[result.point, result.seed] = result

    def _append(self, record: Mapping[str, object]) -> None:
        _write(self._descriptor, record)


@contextmanager
def open_ledger(folder: Path, head: JsonObject) -> Iterator[Ledger]:
    """The ledger of a sweep, begun or gone on with.

    Args:
      head: what the sweep is; ``points`` alone may differ from what the file says, for a sweep may be made longer.

    Raises:
      UserError: the folder holds another sweep of which a trial was begun, a damaged ledger, or one that another process has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{path}: another jaxft sweep is at work here; wait for it, or give another --out"
            ) from error
        raw = path.read_bytes()
        records, whole = _records(path, raw)
        if whole < len(raw):  # a line that a crash cut short
            os.ftruncate(descriptor, whole)
            os.fsync(descriptor)
        if len(records) == 1 and _readable(records[0]):
            # No trial was begun, perhaps for a mistake in the space: it may be another one now.
            os.ftruncate(descriptor, 0)
            records = []
        if not records:
            _write(descriptor, {"kind": "sweep", "format": FORMAT, **head})
            fsync_folder(folder)
            records = [{"kind": "sweep", "format": FORMAT, **head}]
        yield _ledger_of(path, records, head, descriptor)
    finally:
        os.close(descriptor)  # and so unlocks it


def _write(descriptor: int, record: Mapping[str, object]) -> None:
    rest = memoryview((json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode())
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _records(path: Path, raw: bytes) -> tuple[list[JsonObject], int]:
    """The records of a ledger, and how many bytes they take."""
    found, end = [], 0
    for number, line in enumerate(raw.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "kind" not in record:
                raise ValueError
        except ValueError:
            raise UserError(f"{path}:{number}: no record of a sweep; repair the line or give another --out") from None
        found.append(record)
        end += len(line)
    return found, end


def _ledger_of(path: Path, records: list[JsonObject], head: JsonObject, descriptor: int) -> Ledger:
    first = records[0]
    if not _readable(first):
        raise UserError(f"{path}: not a ledger that this version of jaxft can read; give another --out")
    _check_same(path, first, head)
    ledger = Ledger(head, _descriptor=descriptor)
    for record in records[1:]:
        key = (record["point"], record["seed"])
        if record["kind"] == "begun":
            ledger.begun.add(key)
            ledger.points[record["point"]] = record["values"]
        elif key in ledger.finished:
            raise UserError(f"{path}: trial {key[0]} of seed {key[1]} is finished twice; give another --out")
        else:
            ledger.finished[key] = _finished(record)
    return ledger


def _readable(first: JsonObject) -> bool:
    """Whether the first record is that of a ledger that can be gone on with."""
    return first["kind"] == "sweep" and first.get("format") == FORMAT


def _check_same(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError if a ledger is of another sweep; says what differs first."""
    old, new = (json.loads(json.dumps({**one["settings"], **one["space"], **one["search"]})) for one in (was, now))
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key, "not there"), new.get(key, "not there")
        if before != after:
            raise UserError(
                f"{path} is of another sweep: {key} was {before}, now {after}; give the old value to go on with it, "
                "or another --out"
            )


def _plain(result: Finished) -> dict[str, object]:
    return to_json(vars(result))


def _finished(record: Mapping[str, Any]) -> Finished:
    values = {name: value for name, value in record.items() if name != "kind"}
    # Scores that are not finite are texts in JSON, which float() reads.
    values["metrics"] = {name: float(value) for name, value in record["metrics"].items()}
    return Finished(**values | {"course": tuple((step, value) for step, value in record["course"])})
