"""A run's folder on this machine, whose content is put into a bucket: what is there is fetched at the start, what is new is put there.

Order is all that makes it whole, since nothing can be renamed. A step's files are put first, its ``jaxft.json`` last; it is deleted
first. The log is put before the seal of a step, so that it is never shorter than a step says. docs/storage.md argues it.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxft.checkpoint import folders
from jaxft.checkpoint.bucket import LOCK, sealed, step_of
from jaxft.checkpoint.manifest import NAME, DamagedCheckpoint, Manifest, check_files
from jaxft.errors import UserError
from jaxft.machine.buckets.lease import Lease, leased
from jaxft.machine.buckets.store import Entry, Store, each

SEALS = (NAME, "config.json")
"""Files that say that the others of their folder are there: put last, deleted first."""
_STAYS = ("restarts",)
"""Files of this machine alone: whoever starts the run again writes them, and goes on writing."""
_NEEDED = (
    *(
        "config.yaml",
        "log.jsonl",
        "log.jsonl.damaged",
        "timing.jsonl",
        "samples.jsonl",
        "goodput.json",
        "metrics.json",
        "metrics_test.json",
    ),
    *("seeds.json", "seeds_test.json"),
)
"""What a run goes on from besides its steps; all else it makes anew."""
_BUILT = ("export/", "adapter/", "parts/")
"""Folders that a run makes anew, as a whole."""
_AT_ONCE = 16 << 20
"""Bytes of files that are read before they are put; larger ones do not grow."""
_Signature = tuple[int, int, int]


class Mirror:
    """The objects of a run, and the folder that they are made of.

    Args:
      store: where the objects are.
      folder: of this machine; this process works in it alone.
      keep: how many of the newest steps the run keeps; they are fetched whole, others only if they are the best.
      lease: that this run has the folder; None: another process of the run has it, and this one puts its parts of steps alone.
      apart: whether other processes have folders of their own: of steps in parts only the seals are fetched.
    """

    def __init__(self, store: Store, folder: Path, keep: int, lease: Lease | None, *, apart: bool = False) -> None:
        self._store, self._folder, self._keep, self._lease, self._apart = store, folder, keep, lease, apart
        self._there: dict[str, _Signature | None] = {}
        """What is in the bucket, with the file here that it is the content of; None: there is none."""
        self._far: dict[str, str] = {}
        """Objects of steps of which only the seal is here, with the seal's name."""
        self._working = threading.Lock()

    # ------------------------------------------------------------------------------------------------------ the start

    def fetch(self) -> int:
        """Makes the folder what the bucket holds; how many steps there are.

        Raises:
          UserError: no access, or a newer version wrote a step.
          StorageError: the store did not answer for too long.
        """
        entries = self._store.entries()
        steps: dict[str, dict[int, list[str]]] = {}
        for name in sealed(entries):
            group, _, number = (step_of(name) or "").rpartition("/")
            if group:
                steps.setdefault(group, {}).setdefault(int(number), []).append(name)
        plain = [name for name in entries if _inner(name) in _NEEDED]
        # Objects of steps without a seal are of no step: they are deleted with the next step that is put.
        ours = (name for name in entries if step_of(name) is not None or _inner(name).startswith(_BUILT))
        self._there = dict.fromkeys(ours)
        self._clear({f"{group}/{number}" for group, found in steps.items() for number in found})
        each(lambda name: self._get(name, entries), plain)
        for group, found in steps.items():
            self._fetch_steps(group, found, entries)
        return sum(map(len, steps.values()))

    def _fetch_steps(self, group: str, steps: Mapping[int, list[str]], entries: Mapping[str, Entry]) -> None:
        each(lambda name: self._get(name, entries), [f"{group}/{number}/{NAME}" for number in steps])
        manifests, damaged = folders.read_all(self._folder / group)
        wanted = {*folders.kept_steps(manifests, self._keep, None), *damaged}
        whole = False
        for number in sorted(steps, reverse=True):
            in_parts = self._apart and number in manifests and bool(manifests[number].pieces)
            if not in_parts and (number in wanted or not whole):
                whole = self._fetch_step(f"{group}/{number}", steps[number], entries, manifests.get(number)) or whole
            else:
                seal = f"{group}/{number}/{NAME}"
                self._far |= {name: seal for name in steps[number] if name != seal}

    def _fetch_step(self, step: str, names: list[str], entries: Mapping[str, Entry], manifest: Manifest | None) -> bool:
        """Fetches what is not here; whether the step is whole then."""
        folder = self._folder / step
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if path.relative_to(self._folder).as_posix() not in entries:
                path.unlink()
        if manifest is None or not _is_whole(folder, manifest):  # else left here by an earlier part of this run
            each(lambda name: self._get(name, entries), [name for name in names if not name.endswith(f"/{NAME}")])
        self._there |= {name: _signature(self._folder / name) for name in names}
        return manifest is not None and _is_whole(folder, manifest)

    def _clear(self, steps: set[str]) -> None:
        """Removes what an earlier run left here, but for steps that the bucket has too, whose files are compared later."""
        for path in sorted(self._folder.rglob("*"), reverse=True):
            name = path.relative_to(self._folder).as_posix()
            if path.name == LOCK or path.name.startswith(_STAYS) or (step_of(name) or name) in steps:
                continue
            if not path.is_dir() or path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()

    def _get(self, name: str, entries: Mapping[str, Entry]) -> None:
        try:
            self._store.download(name, self._folder / name, entries[name].size)
        except FileNotFoundError as error:
            raise UserError(f"{self._store.address}/{name}: was deleted while the run began; start it again") from error
        self._there[name] = _signature(self._folder / name)

    # -------------------------------------------------------------------------------------------------- steps in parts

    def put(self, step: Path, written: Path, names: Collection[str]) -> None:
        """Puts this process's files of a step: the seal comes last, with the rest of the run, from process 0.

        Args:
          step: the folder that the step will have.
          written: the one that it is written in.
        """
        inside = step.relative_to(self._folder).as_posix()

        def put(name: str) -> None:
            self._store.upload(f"{inside}/{name}", written / name)
            self._there[f"{inside}/{name}"] = _signature(written / name)

        each(put, names)

    def holds(self, step: Path, names: Collection[str]) -> None:
        """Takes note of files of a step that other processes have put: they are there for as long as its seal is here."""
        inside = step.relative_to(self._folder).as_posix()
        for name in (f"{inside}/{name}" for name in names):
            self._there.setdefault(name, None)
            self._far[name] = f"{inside}/{NAME}"

    def fetch_parts(self, step: Path, names: Collection[str]) -> None:
        """Brings files of a step into its folder."""
        self._bring([f"{step.relative_to(self._folder).as_posix()}/{name}" for name in names])

    def fetch_folder(self, folder: Path) -> None:
        """Makes a folder, which process 0 has put, what it is in the bucket."""
        shutil.rmtree(folder, ignore_errors=True)
        start = f"{folder.relative_to(self._folder).as_posix()}/"
        self._bring([name for name in self._store.entries() if name.startswith(start)])

    def _bring(self, names: Collection[str]) -> None:
        entries = self._store.entries() if names else {}
        if lost := [name for name in names if name not in entries]:
            raise DamagedCheckpoint(f"{self._store.address}/{lost[0]}: is missing; use another checkpoint")
        each(lambda name: self._get(name, entries), names)

    # ----------------------------------------------------------------------------------------------------- what is new

    def sync(self) -> None:
        """Puts what is new or has changed, then deletes what has gone.

        Raises:
          UserError: another run has taken the folder over.
          StorageError: the store did not answer for too long; what it held before is whole.
        """
        with self._working:
            if self._lease is None:
                raise RuntimeError("the folder is another process's to put")
            self._lease.check()
            here = dict(self._here())
            changed = [name for name, signature in here.items() if self._there.get(name) != signature]
            seals = {name for name in changed if _is_seal(name)}
            sealed_there = {_folder_of(name): name for name in self._there if _is_seal(name)}
            anew = {sealed_there[folder] for folder in map(_folder_of, changed) if folder in sealed_there}
            # What stands by itself, the log among it; then content of sealed folders, whose seals are taken off before.
            under = [name for name in changed if name not in seals and _is_content(name)]
            self._upload([name for name in changed if name not in seals and name not in set(under)], here)
            self._delete(anew)
            self._upload(under, here)
            self._upload(sorted(seals | (anew & here.keys())), here)
            self._delete_gone(here)

    def _upload(self, names: Iterable[str], here: Mapping[str, _Signature]) -> None:
        def put(name: str) -> None:
            path = self._folder / name
            try:
                if here[name][0] < _AT_ONCE or path.suffix == ".jsonl":
                    self._store.put(name, path.read_bytes())  # one that grows meanwhile is put as it was read
                else:
                    self._store.upload(name, path)
            except FileNotFoundError:
                return  # it was there for a moment; what has gone is deleted the next time
            self._there[name] = here[name]

        each(put, names)

    def _delete_gone(self, here: Mapping[str, _Signature]) -> None:
        built = {_built(name) for name in here}
        gone = [
            name
            for name in self._there
            if name not in here and self._far.get(name) not in here and (_built(name) is None or _built(name) in built)
        ]
        self._delete(name for name in gone if _is_seal(name))
        self._delete(name for name in gone if not _is_seal(name))

    def _delete(self, names: Iterable[str]) -> None:
        names = sorted(names)
        self._store.delete(names)
        for name in names:
            self._there.pop(name, None)
            self._far.pop(name, None)

    def _here(self) -> Iterator[tuple[str, _Signature]]:
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder).as_posix()
            if _is_passing(name) or not path.is_file():
                continue
            try:
                yield name, _signature(path)
            except FileNotFoundError:  # a file that was there for a moment
                continue


@contextmanager
def mirrored(
    address: str, folder: Path, keep: int, note: Callable[[str], None], *, apart: bool = False
) -> Iterator[Mirror]:
    """Holds a run's folder in a bucket, and has on this machine what it holds.

    Args:
      apart: see :class:`Mirror`.

    Raises:
      UserError: another run holds it, or it cannot be used.
      StorageError: the store did not answer for too long.
    """
    store = Store(address)
    with leased(address, note) as lease:
        mirror = Mirror(store, folder, keep, lease, apart=apart)
        steps = mirror.fetch()
        note(
            f"{store.address}: worked on in {folder}, and put there with each step{f'; {steps} steps fetched' if steps else ''}"
        )
        yield mirror


def followed(address: str, folder: Path, keep: int) -> Mirror:
    """What a process other than the first has of a run in a bucket, whose folder it does not share.

    Raises:
      UserError: the folder cannot be used.
      StorageError: the store did not answer for too long.
    """
    mirror = Mirror(Store(address), folder, keep, None, apart=True)
    folder.mkdir(parents=True, exist_ok=True)
    mirror.fetch()
    return mirror


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    try:
        check_files(folder, manifest, hashes=True)
    except DamagedCheckpoint:
        return False
    return True


def _is_seal(name: str) -> bool:
    return name.rpartition("/")[2] in SEALS and _is_content(name)


def _is_content(name: str) -> bool:
    """Whether a file is of a folder that has a seal: a step, or one that is built as a whole."""
    return step_of(name) is not None or _built(name) is not None


def _folder_of(name: str) -> str | None:
    """The sealed folder that a file belongs to."""
    return step_of(name) or _built(name)


def _built(name: str) -> str | None:
    inner = _inner(name)
    start = next((folder for folder in _BUILT if inner.startswith(folder)), None)
    return None if start is None else name.removesuffix(inner) + start


def _is_passing(name: str) -> bool:
    """Files that are only being written, and those of this machine alone; what was set aside is none of them."""
    parts = name.split("/")
    hidden = any(part.startswith(".") and not part.startswith(".aside-") for part in parts)
    return hidden or parts[-1] == LOCK


def _inner(name: str) -> str:
    """The name within the folder of a seed, if it is in one."""
    first, _, rest = name.partition("/")
    return rest if first.startswith("seed") and first[4:].isdigit() else name


def _signature(path: Path) -> _Signature:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino
