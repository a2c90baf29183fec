"""Where the tokenizer of a training checkpoint lies, also after the run's folder has been moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

RUN_SUBFOLDER = "checkpoints"
"""Subfolder of a run's folder that holds its step folders."""


class TokenizerPlace(TypedDict):
    """Where a run's tokenizer is."""

    tokenizer: str
    """An absolute path."""
    tokenizer_inside: NotRequired[str]
    """Its path inside the run's folder."""


def tokenizer_place(tokenizer: Path, run: Path) -> TokenizerPlace:
    """What the meta of a run's checkpoints says of the tokenizer's folder: where it is, and where in the run's folder."""
    tokenizer, run = tokenizer.resolve(), run.resolve()
    if not tokenizer.is_relative_to(run):
        return {"tokenizer": str(tokenizer)}
    return {"tokenizer": str(tokenizer), "tokenizer_inside": tokenizer.relative_to(run).as_posix()}


def find_tokenizer(meta: Mapping[str, object], folder: Path) -> Path | None:
    """The tokenizer's folder of a checkpoint, if it still is there.

    Args:
      meta: of the checkpoint.
      folder: the checkpoint, or the run's folder, as the user named it: both may have moved.
    """
    folder = folder.absolute()
    found = [folder / str(meta["tokenizer"])]  # absolute, or inside the checkpoint
    if "tokenizer_inside" in meta:
        run = next((place for place in (folder, *folder.parents[:2]) if (place / RUN_SUBFOLDER).is_dir()), folder)
        found.insert(0, run / str(meta["tokenizer_inside"]))
    return next((place for place in found if place.is_dir()), None)
