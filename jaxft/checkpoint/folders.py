"""Step folders of a run: which there are, what crashes left, and how one is taken away. Needs neither jax nor devices.

A save is written as ``.saving-STEP``, sealed there, and gets the name ``STEP`` in one rename; a deletion begins with one rename
away from it. So whatever is called ``STEP`` was complete once: if it lacks ``jaxft.json``, that was lost, not "not yet written".
(Versions before this one sealed under the final name; a crash there looks the same, and is treated alike.) Such a step may hold
all of its data: it is never deleted where it stands, but set aside as ``.aside-STEP-xxxxxxxx``, with a limit to how many.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

from jaxft.checkpoint.manifest import NAME, DamagedCheckpoint, Manifest, read_manifest, was_written
from jaxft.errors import NothingUsable, UserError
from jaxft.files import fsync_folder

_STEP = re.compile(r"0|[1-9]\d*")
_ORBAX_ENDING = r"\.orbax-checkpoint-tmp(-\d+)?"
_LEFTOVER = re.compile(
    rf"\d+{_ORBAX_ENDING}|\.saving-\d+({_ORBAX_ENDING})?|\.deleting-\d+-[0-9a-f]{{8}}"
)  # the first: of earlier versions
_SAVING = re.compile(r"\.saving-(\d+)")
_ASIDE = re.compile(r"\.aside-(\d+)-[0-9a-f]{8}")


def step_folders(folder: Path) -> dict[int, Path]:
    """Folders named after a step that something was stored in, sealed or not, whole or not."""
    if not folder.is_dir():
        return {}
    return {int(child.name): child for child in folder.iterdir() if _STEP.fullmatch(child.name) and was_written(child)}


def set_aside(folder: Path) -> list[Path]:
    """What lies aside in a checkpoints folder, that of the highest step first."""
    found = [child for child in folder.iterdir() if _ASIDE.fullmatch(child.name)] if folder.is_dir() else []
    return sorted(found, key=lambda child: (-int(child.name.split("-")[1]), child.name))


def read_all(folder: Path) -> tuple[dict[int, Manifest], dict[int, str]]:
    """Manifests by step, of those that can be read; and of the others, why not. Nothing is hashed.

    Raises:
      UserError: a newer version wrote one of them.
    """
    found, damaged = dict[int, Manifest](), dict[int, str]()
    for step, path in sorted(step_folders(folder).items()):
        try:
            found[step] = read_manifest(path)
        except DamagedCheckpoint as error:
            damaged[step] = error.reason
        except UserError:
            if (path / NAME).exists():
                raise  # else whoever owns the folder has just taken it away
    return found, damaged


def saving(folder: Path, step: int) -> Path:
    """Where a step is written until it is complete."""
    return folder / f".saving-{step}"


def commit(folder: Path, step: int) -> None:
    """Gives a step that has been sealed its name: from now on it counts."""
    saving(folder, step).rename(folder / str(step))
    fsync_folder(folder)


def finish_commits(folder: Path) -> list[int]:
    """Names the steps that a crash left sealed but unnamed: nothing was missing of them."""
    done = []
    for child in folder.iterdir():
        match = _SAVING.fullmatch(child.name)
        if match is not None and (child / NAME).exists() and not (folder / match[1]).exists():
            commit(folder, int(match[1]))
            done.append(int(match[1]))
    return done


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what saves and deletions that did not finish left; returns what it was. Steps, and what is aside, stay."""
    found = [child for child in folder.iterdir() if _LEFTOVER.fullmatch(child.name) and child.is_dir()]
    for child in found:
        shutil.rmtree(child)
    return found


def forget(folder: Path, step: int) -> None:
    """Deletes a step: first its name, durably, then its content."""
    gone = folder / f".deleting-{step}-{uuid.uuid4().hex[:8]}"
    (folder / str(step)).rename(gone)
    fsync_folder(folder)
    shutil.rmtree(gone)


def move_aside(folder: Path, step: int) -> Path:
    """Takes a step out of the way without deleting it; returns where it is now."""
    place = folder / f".aside-{step}-{uuid.uuid4().hex[:8]}"
    (folder / str(step)).rename(place)
    fsync_folder(folder)
    return place


def limit_aside(folder: Path, most: int) -> None:
    """Deletes what is aside beyond the ``most`` of the highest steps."""
    for child in set_aside(folder)[most:]:
        gone = folder / f".deleting-{child.name.removeprefix('.aside-')}"
        child.rename(gone)
        fsync_folder(folder)
        shutil.rmtree(gone)


def kept_steps(manifests: Mapping[int, Manifest], keep: int, keep_every: int | None) -> set[int]:
    """Steps that stay: the last ``keep``, the newest best one, and multiples of ``keep_every``."""
    steps = sorted(manifests)
    best = [step for step in steps if manifests[step].best][-1:]
    multiples = [] if keep_every is None else [step for step in steps if step % keep_every == 0]
    return {*steps[-keep:], *best, *multiples}


def nothing_usable(folder: Path, steps: Collection[int], newest: str) -> NothingUsable:
    """What is said where there are steps and none can be used.

    Args:
      folder: the run's checkpoints.
      newest: what is wrong with the last of ``steps``.
    """
    many = f"all of its {len(steps)} checkpoints are damaged; the newest" if len(steps) > 1 else "its only checkpoint"
    return NothingUsable(
        f"{folder.parent}: {many}, step {max(steps)}: {newest}; nothing was removed: `jaxft checkpoint list {folder.parent}` shows "
        "what is wrong with each; bring the files back to go on, or begin anew in another train.out"
    )
