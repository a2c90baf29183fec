"""A run's folder as the objects of a bucket: which of them count, and copies of what a command needs.

A step is there if its ``jaxft.json`` is: it is put last and deleted first (docs/storage.md).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxft.checkpoint.beside import RUN_SUBFOLDER
from jaxft.checkpoint.manifest import NAME
from jaxft.errors import UserError
from jaxft.machine import buckets

STEP = re.compile(rf"((?:.*/)?{RUN_SUBFOLDER}/(?:0|[1-9]\d*))/(.+)")
"""The name of an object of a step: its folder, and the rest."""
LOCK = "run.lock"
_TRIES = 3


def run_folder(out: str) -> Path:
    """Where a run works: the folder itself, or of a bucket the folder of this machine whose content is put there."""
    if not buckets.is_address(out):
        return Path(out)
    scheme, _, rest = out.partition("://")
    return buckets.cache_root() / "runs" / scheme / Path(*[part for part in rest.split("/") if part])


def step_of(name: str) -> str | None:
    """The folder of the step that an object belongs to, ``checkpoints/30`` say; None: it is of no step."""
    match = STEP.fullmatch(name)
    return None if match is None else match[1]


def sealed(names: Collection[str]) -> list[str]:
    """The names but those of steps that lack their seal: being put, being deleted, or left by a crash."""
    names = set(names)
    return sorted(n for n in names if (step := step_of(n)) is None or f"{step}/{NAME}" in names)


def of_model(names: Collection[str]) -> list[str]:
    """What is needed to open a model: a run's export, else its steps; of any other folder everything."""
    names = [name for name in sealed(names) if name.rpartition("/")[2] != LOCK]
    if "config.yaml" in names and "export/config.json" in names:
        return [name for name in names if name == "config.yaml" or name.startswith("export/")]
    return names


def local_model(reference: str) -> str:
    """A model's reference, of an object store that of a copy."""
    return str(buckets.fetched(reference, of_model)) if buckets.is_address(reference) else reference


@contextmanager
def steps_seen(folder: str, *, whole: bool) -> Iterator[Path]:
    """A run's folder to look at its steps; of a bucket a copy of them.

    Args:
      whole: with the content of all files; else only the seals have theirs, the other files have their sizes.
    """
    if not buckets.is_address(folder):
        yield Path(folder).expanduser().absolute()
        return
    store = buckets.Store(folder)
    with TemporaryDirectory(prefix="jaxft-") as place:
        for number in range(_TRIES):
            copy = Path(place) / str(number)
            if _copied(store, copy, whole=whole):
                yield copy
                return
    raise UserError(f"{folder}: its steps change while they are looked at; try again, or when no run is at work there")


def _copied(store: buckets.Store, place: Path, *, whole: bool) -> bool:
    """Copies a run's steps; False: one of them was deleted meanwhile."""
    entries = store.entries()
    found = {name: entries[name] for name in sealed(entries) if NAME in name or ".aside-" in name or step_of(name)}
    if not found:
        raise UserError(f"{store.address}: no steps are stored here; name a run's folder")
    for name, entry in found.items():
        path = place / name
        if whole or path.name == NAME:
            try:
                store.download(name, path, entry.size)
            except FileNotFoundError:
                return False
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(entry.size)
    return True
