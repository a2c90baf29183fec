"""Copies of objects in a cache folder of this machine, found again while the objects are what they were.

A copy lies under the hash of its address and of what the store says of each object (size, and etag, generation or time): an object that was
put anew has another one. Several processes at once fetch it once; the others wait.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from jaxft.errors import UserError, not_written
from jaxft.machine.buckets.store import Entry, Store, each

Choose = Callable[[Collection[str]], Collection[str]]
"""Which of the objects below an address are wanted."""
_TRIES = 3


def cache_root() -> Path:
    """Where copies lie: ``JAXFT_CACHE``, else ``jaxft`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if said := os.environ.get("JAXFT_CACHE"):
        return Path(said).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "jaxft"


def fetched(address: str, choose: Choose | None = None) -> Path:
    """A copy of an object, or of all below an address, as it is now.

    Args:
      choose: which objects of a folder; None: all.

    Raises:
      UserError: there is nothing, no access, or no package for this kind of store.
      StorageError: the store did not answer for too long.
    """
    store = Store(address)
    for _ in range(_TRIES):
        found = _there(store, choose)
        place = cache_root() / "objects" / _key(store.address, found)
        inside = Path(*store.address.partition("://")[2].split("/"))
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _alone(place.with_name(f"{place.name}.lock")):
                if place.is_dir() or _made(store, found, place, inside, choose):
                    return place / inside
        except OSError as error:
            raise not_written(error.filename or place, error) from error
    raise UserError(f"{address}: changes while it is being fetched; try again when it is whole")


def fetched_rows(reference: str) -> str:
    """A path or pattern of this machine that names copies of the files that ``reference`` names: an object, a folder or a pattern.

    Raises:
      UserError: nothing is there, or it cannot be fetched.
    """
    if not glob.has_magic(reference):
        return str(fetched(reference))
    parts = reference.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    pattern = parts[first:]
    if first < 3 or "**" in pattern:
        raise UserError(f"{reference}: a pattern must leave the bucket's name alone, and hold no **")

    def matching(names: Collection[str]) -> list[str]:
        return [name for name in names if _matches(name.split("/"), pattern)]

    return str(Path(glob.escape(str(fetched("/".join(parts[:first]), matching))), *pattern))


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


def _there(store: Store, choose: Choose | None) -> dict[str, Entry]:
    whole = store.entry() if choose is None else None
    if whole is not None:
        return {"": whole}
    entries = store.entries()
    names = entries if choose is None else choose(entries)
    found = {name: entries[name] for name in names}
    if not found:
        what = f"none of the {len(entries)} objects here is what is asked for" if entries else "there is nothing here"
        raise UserError(f"{store.address}: {what}; check the address")
    return found


def _key(address: str, found: Mapping[str, Entry]) -> str:
    said = [address, sorted((name, entry.size, entry.version) for name, entry in found.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _made(store: Store, found: Mapping[str, Entry], place: Path, inside: Path, choose: Choose | None) -> bool:
    """Fetches into ``place``; False: an object was put anew meanwhile."""
    fresh = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        each(lambda name: store.download(name, fresh / inside / name, found[name].size), found)
        if _there(store, choose) != found:
            return False
        fresh.rename(place)
    except FileNotFoundError:  # deleted after it had been listed
        return False
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return True


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the kernel lets the next one in however the first one ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
