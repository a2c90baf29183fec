"""Full training states under one folder: saved in the background, verified at restore, deleted in an order that a crash
cannot turn into a half checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxft.checkpoint import apart, folders, layout, pieces
from jaxft.checkpoint.content import load_checked, with_versions
from jaxft.checkpoint.manifest import (
    FORMAT,
    DamagedCheckpoint,
    LeafSpec,
    Manifest,
    check_files,
    read_manifest,
    seal,
)
from jaxft.errors import StorageError, UserError, storage_problem
from jaxft.machine import processes

_numbers = itertools.count()
_REASON = 100
"""Most characters of a library's message, or of a path, in a line of ours."""
logger = logging.getLogger("jaxft.checkpoint")


class Restored(NamedTuple):
    """What :meth:`Checkpoints.restore` found."""

    step: int
    state: PyTree[jax.Array]
    meta: dict[str, object]


class Checkpoints:
    """Full training states under one folder: ``<step>/``, written by Orbax, plus ``<step>/jaxft.json``, written last.

    One training run owns the folder: constructing this removes what crashed saves and deletions left there, but nothing that was
    complete once (:mod:`jaxft.checkpoint.folders`). To only
    read (perhaps while a run is writing), use :func:`~jaxft.checkpoint.restore_params` and
    :func:`~jaxft.checkpoint.read_manifest`.

    With several processes, all construct it and call its methods in the same order, on a shared file system. Process 0
    hashes, writes manifests, verifies and deletes, each after Orbax's own barrier. With ``parts`` each process has a folder of its own,
    where it does all of that for its part of each step (:mod:`jaxft.checkpoint.apart`).

    Args:
      folder: created if missing.
      keep: how many of the newest steps stay; the best one stays besides.
      keep_every: steps that are multiples of it stay, too.
      verify: compare the hash of every file before a checkpoint is believed; existence and size are always compared.
      stored: called in process 0, in the thread that saves, when a step is complete and those that do not stay are gone; the
        save ends with it.
      parts: where processes that do not share ``folder`` leave their parts of each step; None: they share it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        verify: bool = True,
        stored: Callable[[], None] | None = None,
        parts: apart.Parts | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: must be at least 1")
        self.folder = Path(folder).absolute()
        self._keep, self._keep_every = keep, keep_every
        self._verify, self._stored, self._parts = verify, stored, parts
        self._name, self._saves = f"store{next(_numbers)}", 0
        self._saving: threading.Thread | None = None
        self._failure: UserError | None = None
        self._damaged: set[int] = set()
        # Not atexit: that is after concurrent.futures, which Orbax needs to the end, has shut down (a save then fails
        # or hangs). There is no public name for it. A weak reference, or no store would be freed before the end.
        threading._register_atexit(_finish_at_exit, weakref.ref(self))  # pyrefly: ignore[missing-attribute]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._owns():
                folders.finish_commits(self.folder)
            self._clean()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be used for checkpoints: {error}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: PyTree[jax.Array], meta: Mapping[str, object], *, best: bool = False) -> None:
        """Saves in the background. When this returns, buffers of ``state`` may be donated. Waits for an earlier save.

        A program must not end before :meth:`wait` or :meth:`close`. On Python 3.11 its end waits for the save; since 3.12
        Python starts no thread once a program is ending, Orbax needs some, and the save fails or never ends.

        Args:
          step: names the checkpoint; there must be none of this number.
          state: tree of arrays.
          meta: plain JSON to be returned by :meth:`restore`; ``versions`` is added.
          best: this state is the best so far.

        Raises:
          UserError: an earlier save failed, or the step exists.
        """
        self.wait()
        flat = layout.flatten(state)
        tree = layout.specs_of(flat)
        meta = with_versions(meta)
        temporary = self._free(step)
        self._saves += 1
        occasion = f"{self._name}/{self._saves}"
        before = f"{self._name}/{self._saves - 1}" if self._saves > 1 else None
        writing, copies = self._begin(step, temporary, flat, tree)

        def write(writing: ocp.AsyncResponse[None]) -> None:
            writing.result()
            if processes.is_first():
                seal(temporary, kind="state", step=step, best=best, tree=tree, meta=meta)
                folders.commit(self.folder, step)

        def written() -> None:
            if isinstance(writing, apart.Writing):
                said = Manifest(FORMAT, "state", step, best, tree, meta, {})
                apart.store(writing, said, self.folder, occasion, before, tidied)
                return
            try:
                write(writing)
            except Exception as error:
                if copies is None:
                    raise  # other processes may still write there; wait() cleans once all have ended
                folders.remove_leftovers(self.folder)
                if storage_problem(error) is None:
                    raise
                logger.warning("step %d: %s; saving it once more", step, storage_problem(error))
                write(layout.start_save(temporary, copies, keeps=True))
            tidied()

        def tidied() -> None:
            nonlocal what
            what = "is complete, but removing older ones failed"
            if self._owns():
                self._retain(step)
            if self._stored is not None and processes.is_first():
                self._stored()

        what = "failed"

        def finish() -> None:
            try:
                written()
            except UserError as error:
                self._failure = error
            except Exception as error:  # noqa: BLE001 - the next wait() raises it; in this thread nobody would see it
                self._failure = self._failed(step, error, what)
                self._failure.__cause__ = error

        self._saving = threading.Thread(target=finish, name=f"checkpoint-{step}")
        self._saving.start()

    def _begin(
        self, step: int, temporary: Path, flat: Mapping[str, jax.Array | np.ndarray], tree: Mapping[str, LeafSpec]
    ) -> tuple[ocp.AsyncResponse[None] | apart.Writing, dict[str, jax.Array | np.ndarray] | None]:
        """A save under way, and what may be written a second time."""
        if self._parts is not None:
            share = pieces.share_of(flat)
            self._check_room(step, pieces.size_of(share))
            return apart.Writing(temporary, share, self._parts), None
        self._check_room(step, layout.size_of(tree))
        arrays, again = layout.detach(flat)
        try:
            writing = layout.start_save(temporary, arrays, keeps=True)
        except (OSError, ValueError) as error:
            self._clean()
            raise self._failed(step, error) from error
        return writing, arrays if again else None

    def _owns(self) -> bool:
        """Whether this process sees to the folder: names steps there, and takes them away."""
        return self._parts is not None or processes.is_first()

    def wait(self) -> None:
        """Returns when nothing is being saved any more.

        Raises:
          UserError: a save failed since the last call; said once.
        """
        if self._saving is not None:
            self._saving.join()
            self._saving = None
            failure, self._failure = self._failure, None
            if processes.anyone(failure is not None):
                # What cannot be removed now is removed at the next start; the failure is what is told.
                with contextlib.suppress(OSError):
                    self._clean()
                raise failure or UserError("a checkpoint failed in another process; its log says why")

    def close(self) -> None:
        """Waits for a save that is still running."""
        self.wait()

    def steps(self) -> tuple[int, ...]:
        """Complete checkpoints, ascending: those with a readable manifest. Nothing is hashed."""
        return tuple(sorted(self._manifests()))

    def best(self) -> int | None:
        """The newest step saved with ``best=True``. Its own manifest says so: no crash can part the two."""
        return max((step for step, manifest in self._manifests().items() if manifest.best), default=None)

    def forget_after(self, step: int) -> None:
        """Deletes what was stored after a step, the newest first: a run that went back comes by those steps again."""
        self.wait()
        if self._owns():
            for later in sorted((one for one in folders.step_folders(self.folder) if one > step), reverse=True):
                folders.forget(self.folder, later)
        processes.barrier("forget")

    def restore(self, like: PyTree[layout.Shaped], step: int | None = None) -> Restored:
        """The newest intact checkpoint, or the one asked for by number.

        Damaged ones are passed over with one warning each, and replaced or removed by later saves. One asked for by
        number never is.

        Args:
          like: the state as :class:`jax.ShapeDtypeStruct` with shardings (any mesh), or as arrays.
          step: which one; None: the newest.

        Raises:
          UserError: none there, none intact, or it does not fit ``like``.
        """
        self.wait()
        wanted = layout.flatten(like)
        specs = layout.specs_of(wanted)
        if step is not None:
            return self._restore(step, like, wanted, specs)
        candidates = sorted(folders.step_folders(self.folder), reverse=True)
        if not candidates:
            raise UserError(f"{self.folder}: there is no checkpoint here")
        reasons = dict[int, str]()
        for candidate in candidates:
            try:
                restored = self._restore(candidate, like, wanted, specs)
            except DamagedCheckpoint as error:
                reasons[candidate] = error.reason
                self._damaged.add(candidate)
                continue
            if reasons and processes.is_first():
                logger.warning("going on from step %d, not %s", candidate, _said(reasons))
            return restored
        raise folders.nothing_usable(self.folder, candidates, reasons[candidates[0]])

    def _restore(
        self, step: int, like: PyTree[layout.Shaped], wanted: Mapping[str, layout.Shaped], specs: dict[str, LeafSpec]
    ) -> Restored:
        folder = self.folder / str(step)
        if not folder.is_dir():
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.folder}: there is no checkpoint of step {step}; there are: {there}")
        self._check(folder, wanted, specs)
        arrays = load_checked(folder, wanted, verified=self._verify)
        state = jax.tree.unflatten(jax.tree.structure(like), list(arrays.values()))
        return Restored(step, state, read_manifest(folder).meta)

    def _check(self, folder: Path, wanted: Mapping[str, layout.Shaped], specs: dict[str, LeafSpec]) -> None:
        """Raises the same kind of error in all processes; process 0 has the details, with parts the one that found it."""
        problem: UserError | None = None
        if self._owns():
            try:
                manifest = read_manifest(folder)
                layout.check_tree(folder, manifest.tree, specs)
                if manifest.pieces and self._parts is not None:
                    apart.fetch_share(folder, manifest, wanted, self._parts, self._verify)
                else:
                    check_files(folder, manifest, hashes=self._verify)
            except UserError as error:
                problem = error
        damaged = processes.anyone(isinstance(problem, DamagedCheckpoint))
        if damaged or processes.anyone(problem is not None):
            kind = DamagedCheckpoint if damaged else UserError
            own = problem is not None and isinstance(problem, DamagedCheckpoint) == damaged
            raise problem if problem is not None and own else kind(f"{folder}: refused; another process's log says why")

    def _manifests(self) -> dict[int, Manifest]:
        return folders.read_all(self.folder)[0]

    def empty(self) -> bool:
        """Whether no step was ever stored here; one that cannot be used counts as stored."""
        return not folders.step_folders(self.folder)

    def _free(self, step: int) -> Path:
        """Where to write a step, with nothing in the way of it or of its final name.

        A step that cannot be used makes room: training that went on from an older one comes by it again.
        """
        if step < 0:
            raise ValueError(f"step={step}: must not be negative")
        if not self.folder.is_dir():
            raise StorageError(f"{_short(self.folder)} was removed while the run stored its steps there; the run ends")
        try:
            self._clean()
            if self._owns() and step in self._unusable():
                self._set_aside([step])
            processes.barrier("checkpoint free")
        except OSError as error:
            raise self._failed(step, error) from error
        self._damaged.discard(step)
        target = self.folder / str(step)
        if target.exists():
            raise UserError(f"{target} already exists; resume from it, remove it, or save to another folder")
        return folders.saving(self.folder, step)

    def _check_room(self, step: int, size: int) -> None:
        """Refuses a save that cannot fit, before anything is written. Quotas are not seen here."""
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._failed(step, error) from error
        if processes.anyone(size > free):
            raise StorageError(
                f"checkpoint of step {step} needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in "
                f"{_short(self.folder)}; earlier checkpoints are intact; make room, and the same command goes on"
            )

    def _failed(self, step: int, error: Exception, what: str = "failed") -> UserError:
        if not self.folder.is_dir():
            return StorageError(f"checkpoint of step {step} {what}: {_short(self.folder)} is not there any more")
        problem = storage_problem(error)
        reason = problem or " ".join(str(error).split())[:_REASON] or type(error).__name__
        return (UserError if problem is None else StorageError)(
            f"checkpoint of step {step} {what}: {reason}; earlier checkpoints are intact; "
            f"check space and permissions of {_short(self.folder)}"
        )

    def _clean(self) -> None:
        """Removes what crashed or failed saves and deletions left; a step is none of it, even if it cannot be used."""
        if self._owns():
            for path in folders.remove_leftovers(self.folder):
                logger.info("removed %s, left by a save or deletion that did not finish", path)
        processes.barrier("checkpoint clean")

    def _unusable(self) -> dict[int, str]:
        """Steps whose manifest cannot be read, or whose files restore() found damaged, and why."""
        there = folders.step_folders(self.folder)
        found = {step: "damaged files" for step in self._damaged if step in there}
        return found | folders.read_all(self.folder)[1]

    def _set_aside(self, steps: list[int]) -> None:
        places = [folders.move_aside(self.folder, step).name for step in steps]
        logger.warning(
            "%s: step%s %s cannot be used, and may still hold data: moved to %s; the last %d such are kept",
            self.folder, "s" * (len(steps) > 1), ", ".join(map(str, steps)), ", ".join(places), self._keep,
        )  # fmt: skip
        folders.limit_aside(self.folder, self._keep)

    def _retain(self, saved: int) -> None:
        """Deletes what is neither among the newest nor the best, and sets aside what cannot be used.

        Steps after the one just saved stay: they are of a run that went further before someone resumed from an older
        step, and must not push out the new ones.
        """
        unusable = sorted(self._unusable())
        if unusable:
            self._set_aside(unusable)
        self._damaged.clear()
        past = {step: manifest for step, manifest in self._manifests().items() if step <= saved}
        for step in sorted(past.keys() - folders.kept_steps(past, self._keep, self._keep_every)):
            folders.forget(self.folder, step)


def _short(folder: Path) -> str:
    text = str(folder)
    return text if len(text) <= _REASON else f"...{text[3 - _REASON :]}"


def _said(reasons: Mapping[int, str]) -> str:
    """Why newer steps are passed over: of the newest in full, the others by number."""
    newest, *others = reasons
    more = f" (nor {', '.join(map(str, others))}, damaged as well)" if others else ""
    return f"{newest}{more}: {reasons[newest]}"


def _finish_at_exit(reference: weakref.ref[Checkpoints]) -> None:
    """Lets a running save end with the program, and says what no wait() has raised."""
    store = reference()
    if store is not None:
        if store._saving is not None:
            store._saving.join()
        if store._failure is not None:
            logger.error("%s", store._failure)
