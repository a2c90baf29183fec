"""Steps of processes that see nothing of each other's files: each stores its part, and the step counts once all parts are stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from jaxft.checkpoint import folders, pieces
from jaxft.checkpoint.layout import Shaped
from jaxft.checkpoint.manifest import (
    FORMAT,
    NAME,
    DamagedCheckpoint,
    FileSpec,
    Manifest,
    check_files,
    hash_and_sync,
    render,
)
from jaxft.errors import StorageError
from jaxft.files import write_atomic
from jaxft.machine import processes


class Parts(Protocol):
    """Where all parts lie: a bucket."""

    def put(self, step: Path, written: Path, names: Collection[str]) -> None:
        """Stores this process's files of a step.

        Args:
          step: the folder that the step will have.
          written: the one that it is written in.
        """
        ...

    def fetch_parts(self, step: Path, names: Collection[str]) -> None:
        """Brings files of a step into its folder."""
        ...

    def holds(self, step: Path, names: Collection[str]) -> None:
        """Takes note that other processes have stored these files of a step."""
        ...


@dataclass(frozen=True)
class RunBucket:
    """The bucket that a run's folder is put into, as this process deals with it."""

    sync: Callable[[], None]
    """Puts what is new; process 0 does."""
    parts: Parts | None
    """None: all processes see the folder of process 0."""
    share: Callable[[Path], None]
    """Called by all: makes a folder that process 0 has written one that all see."""


class Writing(NamedTuple):
    """A part of a state that is to be written and stored."""

    folder: Path
    share: pieces.Share
    parts: Parts


def store(
    writing: Writing, manifest: Manifest, checkpoints: Path, occasion: str, before: str | None, then: Callable[[], None]
) -> None:
    """Writes and stores this process's part of a step, waits for the others', and gives the step its name in this process's folder.

    Args:
      writing: this process's part.
      manifest: of the step, without its files; that of process 0 is the one that counts.
      checkpoints: the folder of steps.
      occasion: a name that no other save has.
      before: that of the save before; None: there was none.
      then: called once the step has its name; all wait until it has been in all processes.

    Raises:
      StorageError: another process has failed.
    """
    folder, step = writing.folder, checkpoints / str(manifest.step)
    with _told(f"{occasion}/files", step) as told:
        folder.mkdir(parents=True, exist_ok=True)
        pieces.write(folder, writing.share)
        files = hash_and_sync(folder)
        writing.parts.put(step, folder, files)
        told.mine = json.dumps({name: [file.size, file.sha256] for name, file in files.items()})
    if before is not None:  # whoever has said something of this save has read all of the one before
        processes.forget(before)
    files = {name: FileSpec(*spec) for text in told.said for name, spec in json.loads(text).items()}
    whole = replace(manifest, format=FORMAT, files=files, pieces=writing.share.pieces)
    text = processes.exchange(f"{occasion}/manifest", render(whole) if processes.is_first() else "")[0]
    with _told(f"{occasion}/stored", step) as told:
        writing.parts.holds(step, files)
        write_atomic(folder / NAME, text)
        folders.commit(checkpoints, int(step.name))
        then()
        told.mine = "done"


@dataclass
class _Told:
    """What this process tells the others, and what all have told."""

    mine: str = ""
    said: list[str] = field(default_factory=list)


@contextmanager
def _told(occasion: str, step: Path) -> Iterator[_Told]:
    """Waits for all processes after the block. One whose block ends without a word has failed, and so have all.

    Raises:
      StorageError: another process has failed.
    """
    told = _Told()
    try:
        yield told
    finally:
        told.said = processes.exchange(occasion, told.mine)
    failed = [str(number) for number, text in enumerate(told.said) if not text]
    if failed:
        raise StorageError(
            f"checkpoint of step {step.name} failed in process {', '.join(failed)}, whose log says why; earlier checkpoints are intact"
        )


def fetch_share(step: Path, manifest: Manifest, like: Mapping[str, Shaped], parts: Parts, verify: bool) -> None:
    """Brings what this process restores of a step into its folder, and compares it with the manifest.

    Raises:
      DamagedCheckpoint: a file is not the one that was written.
      StorageError: it could not be fetched.
    """
    names = pieces.files_for(manifest, like)
    parts.fetch_parts(step, [name for name in names if not _is_sound(step, manifest, name, verify)])
    check_files(step, manifest, hashes=verify, names=names)


def _is_sound(step: Path, manifest: Manifest, name: str, verify: bool) -> bool:
    try:
        check_files(step, manifest, hashes=verify, names=[name])
    except DamagedCheckpoint:
        return False
    return True
