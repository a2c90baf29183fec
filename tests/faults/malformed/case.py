"""What a malformed input is, the sound files that it is made from, and damages that any kind of file may have."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny import LABELS, make_folder, rows, write_csv

Damage = Callable[[Path], object]
"""Spoils something in a folder that holds the sound files."""
MILLION = "x" * 1_000_000
TRAIN = (
    "train model.init=base data.train=train.csv data.eval=eval.csv data.max_length=16 data.buckets=[16] "
    "train.batch_size=8 eval.batch_size=8 train.steps=2 train.out=made/run train.compilation_cache=null log.progress=off"
)


@dataclass(frozen=True)
class Case:
    """One malformed input, and the command that meets it."""

    kind: str
    name: str
    damage: Damage
    command: tuple[str, ...]
    """Arguments, with paths relative to the folder."""
    codes: tuple[int, ...] = (2,)
    """Exit codes that are right."""
    told: str | None = None
    """What standard output (of commands that report on damage, and go on) must say; None: the one line on stderr is all."""
    writes: bool = False
    """Whether the command may write what it was asked for: it ends well."""

    @property
    def id(self) -> str:
        """A name of its own in the battery."""
        return f"{self.kind}: {self.name}"


def words(command: str) -> tuple[str, ...]:
    """The arguments of a command without blanks in any of them."""
    return tuple(command.split())


def make_sound(folder: Path) -> None:
    """The sound files: an encoder, a classifier (also as a checkpoint), rows, a run file."""
    from jaxft.__main__ import main

    folder.mkdir(parents=True)
    make_folder(folder / "base")
    make_folder(folder / "model", "classification", LABELS)
    for name in ("base", "model"):
        shutil.rmtree(folder / f"{name}.tokenizer", ignore_errors=True)
        (folder / name / "SHA256SUMS").unlink(missing_ok=True)  # else it would be what is told
    write_csv(folder / "train.csv", rows(24))
    write_csv(folder / "eval.csv", rows(8, seed=1))
    (folder / "run.yaml").write_text("model: {init: base}\ndata: {train: train.csv, eval: eval.csv}\n")
    if main(["convert", str(folder / "model"), str(folder / "checkpoint"), "--to", "jaxft"]) != 0:
        raise RuntimeError("the sound checkpoint could not be made")


def put(name: str, content: str | bytes) -> Damage:
    """Another content of a file."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content

    def damage(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)

    return damage


def both(*damages: Damage) -> Damage:
    """Several damages, one after the other."""
    return lambda folder: [damage(folder) for damage in damages]


def gone(name: str) -> Damage:
    """A file or folder that is not there."""
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def keys(name: str, **changes: object) -> Damage:
    """Other values of keys of a JSON file; ``...`` takes the key out."""

    def damage(folder: Path) -> None:
        path = folder / name
        tree = json.loads(path.read_text()) if path.is_file() else {}
        tree |= changes
        path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return damage


def no_files(name: str) -> Iterator[tuple[str, Damage]]:
    """Things in the place of a file that are none."""

    def replaced(make: Callable[[Path], object]) -> Damage:
        def damage(folder: Path) -> None:
            path = folder / name
            path.unlink(missing_ok=True)
            make(path)

        return damage

    yield "a FIFO", replaced(os.mkfifo)
    yield "a folder", replaced(Path.mkdir)
    yield "a link to itself", replaced(lambda path: path.symlink_to(path.name))
    yield "a link to nothing", replaced(lambda path: path.symlink_to("nowhere"))
    yield "an endless device", replaced(lambda path: path.symlink_to("/dev/zero"))


def bad_json(name: str) -> Iterator[tuple[str, Damage]]:
    """What a JSON file with an object in it may hold instead."""
    deep = 100_000
    contents: dict[str, str | bytes] = {
        "empty": "",
        "cut off": '{"a": ',
        "a list": "[]",
        "null": "null",
        "a number": "5",
        "deep lists": "[" * deep,
        "deep objects": '{"a":' * deep,
        "deep and closed": '{"a":' + "[" * deep + "]" * deep + "}",
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "NUL bytes": b"\0" * 1000,
        "a number of 5000 digits": '{"a": ' + "9" * 5000 + "}",
        "rubbish behind": '{"a": 1} x',
        "one long line of rubbish": MILLION,
        "a long name": '{"' + MILLION + '": 1',
        "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
        "1 GB of blanks": b"",
    }
    for title, content in contents.items():
        yield title, sparse(name, 1 << 30) if title.startswith("1 GB") else put(name, content)
    yield from no_files(name)


def sparse(name: str, size: int) -> Damage:
    """A file of so many zero bytes, which take no room on the disk."""

    def damage(folder: Path) -> None:
        with open(folder / name, "wb") as file:
            file.truncate(size)

    return damage
