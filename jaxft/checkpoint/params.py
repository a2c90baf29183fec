"""Parameters without the rest of the training state."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxft.checkpoint import layout, pieces
from jaxft.checkpoint.beside import RUN_SUBFOLDER
from jaxft.checkpoint.content import load_checked, with_versions
from jaxft.checkpoint.folders import nothing_usable, step_folders
from jaxft.checkpoint.manifest import NAME, DamagedCheckpoint, LeafSpec, Manifest, check_files, read_manifest, seal
from jaxft.errors import UserError
from jaxft.files import fsync_folder, refuse_existing
from jaxft.machine import processes
from jaxft.trees import Tree

T = TypeVar("T")
_KEPT = 3
"""Arrays of an open checkpoint that are kept: as many as one tensor of a Hugging Face folder is made of."""
logger = logging.getLogger("jaxft.checkpoint")


def save_params(
    folder: Path, params: PyTree[Array], meta: Mapping[str, object], files: Mapping[str, Path] | None = None
) -> None:
    """Writes parameters as one checkpoint folder, whole or not at all.

    Args:
      folder: to write.
      params: dict of arrays.
      meta: plain JSON to keep with them.
      files: copied into the folder, by the paths inside it that they get: what belongs to the model besides.

    Raises:
      UserError: ``folder`` exists and is not empty, or cannot be written.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of arrays, not {type(params).__name__}")
    target = Path(folder).absolute()
    flat = layout.flatten({"params": params})
    tree = layout.specs_of(flat)
    meta = with_versions(meta)
    refuse_existing(target)
    # The same name in all processes, for Orbax.
    temporary = target.with_name(f".{target.name}.saving")
    try:
        if processes.is_first():
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
        processes.barrier("checkpoint params begin")
        layout.start_save(temporary, flat, keeps=True).result()
        if processes.is_first():
            for name, source in (files or {}).items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, temporary / name)
            seal(temporary, kind="params", step=None, best=False, tree=tree, meta=meta)
            if target.exists():
                target.rmdir()
            os.replace(temporary, target)
            fsync_folder(target.parent)
        processes.barrier("checkpoint params end")
    except (OSError, ValueError) as error:
        _remove(temporary)
        raise UserError(f"{target}: could not be written: {' '.join(str(error).split())}; check space there") from error


def _remove(temporary: Path) -> None:
    """Removes a temporary folder, and Orbax's own temporary folder for it."""
    for path in (temporary, *temporary.parent.glob(f"{temporary.name}.orbax-checkpoint-tmp*")):
        if path.exists():
            shutil.rmtree(path)


def restore_params(
    folder: Path, like: PyTree[Array] | None = None, *, average: bool = True, verify: bool = True
) -> tuple[PyTree[Array], dict[str, object]]:
    """Parameters and meta from whatever holds them; optimizer state is neither read nor hashed.

    Args:
      folder: a parameters-only folder, a step folder of a full state, or a run's folder or checkpoints folder. In the
        last two cases the best step is taken, else the newest; damaged ones are passed over with one warning each.
      like: parameters as :class:`jax.ShapeDtypeStruct` with shardings, or as arrays; None: numpy arrays in dicts.
      average: from a full state, take the moving average if it has one.
      verify: compare the hash of every file that is read.

    Raises:
      UserError: no checkpoint there, a damaged one, or one that does not fit ``like``.
    """
    return _first_sound(folder, lambda path: _restore(path, like, average, verify))


def open_params(
    folder: Path, *, average: bool = True, verify: bool = True
) -> tuple[Tree[StoredArray], dict[str, object]]:
    """Parameters, as dicts of :class:`StoredArray` that are read when they are used, and meta, from whatever holds them.

    Arguments and errors are those of :func:`restore_params`; files are compared with their hashes here, before anything is used.
    """
    return _first_sound(folder, lambda path: _opened(path, average, verify))


def _first_sound(folder: Path, read: Callable[[Path], T]) -> T:
    """What is read of the best checkpoint in a folder that is not damaged."""
    candidates = _candidates(Path(folder).absolute())
    if not candidates:
        raise UserError(f"{folder}: there is no jaxft checkpoint here; name a run, a step folder or saved parameters")
    reasons = dict[Path, str]()
    for path in candidates:
        try:
            return read(path)
        except UserError as error:
            # Without a manifest now: a run that is still going has just deleted it.
            damaged = isinstance(error, DamagedCheckpoint)
            if len(candidates) == 1 or (not damaged and (path / NAME).exists()):
                raise
            reasons[path] = error.reason if isinstance(error, DamagedCheckpoint) else str(error)
            if path != candidates[-1]:
                logger.warning("%s: falling back to the next best in %s", reasons[path], path.parent)
    newest = max(candidates, key=lambda path: int(path.name))
    raise nothing_usable(newest.parent, [int(path.name) for path in candidates], reasons[newest])


def is_checkpoint(folder: Path) -> bool:
    """Whether :func:`restore_params` finds a checkpoint in ``folder``, intact or not."""
    return bool(_candidates(Path(folder).absolute()))


def _candidates(folder: Path) -> list[Path]:
    """Step folders in order of preference."""
    if (folder / NAME).exists():
        return [folder]
    found = step_folders(folder) or step_folders(folder / RUN_SUBFOLDER)
    newest_first = [found[step] for step in sorted(found, reverse=True)]
    best = next((path for path in newest_first if _is_best(path)), None)
    return newest_first if best is None else [best, *(path for path in newest_first if path != best)]


def _is_best(folder: Path) -> bool:
    try:
        return read_manifest(folder).best
    except DamagedCheckpoint:
        return False  # restoring it says what is wrong with it


def _restore(
    folder: Path, like: PyTree[Array] | None, average: bool, verify: bool
) -> tuple[PyTree[Array], dict[str, object]]:
    manifest = read_manifest(folder)
    group = _group(manifest, average)
    stored = layout.subtree(manifest, group)
    if not stored:
        raise UserError(f"{folder}: this checkpoint holds no parameters")
    wanted = _empty(stored) if like is None else layout.flatten(like)
    layout.check_tree(folder, stored, layout.specs_of(wanted))
    check_files(folder, manifest, hashes=verify, within={group})
    arrays = load_checked(folder, {f"{group}/{path}": leaf for path, leaf in wanted.items()}, verified=verify)
    if like is None:
        return layout.unflatten(arrays)[group], manifest.meta
    return jax.tree.unflatten(jax.tree.structure(like), list(arrays.values())), manifest.meta


class StoredArray:
    """An array in a checkpoint, read when it is used. Of all arrays of a checkpoint, those that were used last are kept."""

    def __init__(self, spec: LeafSpec, read: Callable[[], np.ndarray]) -> None:
        self.shape, self.dtype = spec.shape, jnp.dtype(spec.dtype)
        self.ndim = len(spec.shape)
        self._read = read

    def __getitem__(self, index: int) -> np.ndarray:
        return self._read()[index]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self._read() if dtype is None else self._read().astype(dtype)


def _opened(folder: Path, average: bool, verify: bool) -> tuple[Tree[StoredArray], dict[str, object]]:
    manifest = read_manifest(folder)
    group = _group(manifest, average)
    stored = layout.subtree(manifest, group)
    if not stored:
        raise UserError(f"{folder}: this checkpoint holds no parameters")
    check_files(folder, manifest, hashes=verify, within={group})

    @functools.lru_cache(_KEPT)
    def read(path: str) -> np.ndarray:
        others = [f"{group}/{other}" for other in stored if other != path]
        like = np.empty(stored[path].shape, jnp.dtype(stored[path].dtype))
        if manifest.pieces:
            return np.asarray(pieces.load(folder, manifest, {f"{group}/{path}": like})[f"{group}/{path}"])
        return layout.load_one(folder, f"{group}/{path}", like, others)

    arrays = {path: StoredArray(spec, functools.partial(read, path)) for path, spec in stored.items()}
    return layout.unflatten(arrays), manifest.meta


def _group(manifest: Manifest, average: bool) -> str:
    averaged = average and manifest.kind == "state" and bool(layout.subtree(manifest, "ema"))
    return "ema" if averaged else "params"


def _empty(stored: dict[str, LeafSpec]) -> dict[str, np.ndarray]:
    return {path: np.empty(leaf.shape, jnp.dtype(leaf.dtype)) for path, leaf in stored.items()}
