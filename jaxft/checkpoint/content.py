"""Reading what a checkpoint holds, whichever way it was written, and saying what wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint

import jaxft
from jaxft.checkpoint import layout, pieces
from jaxft.checkpoint.manifest import DamagedCheckpoint, copy_json, read_manifest


def with_versions(meta: Mapping[str, object]) -> dict[str, object]:
    """A copy of ``meta`` with the versions that write it."""
    versions = {"jaxft": jaxft.__version__, "jax": jax.__version__, "orbax": orbax.checkpoint.__version__}
    return {**copy_json(meta), "versions": versions}


def load_checked(
    folder: Path, like: Mapping[str, layout.Shaped], *, verified: bool
) -> dict[str, jax.Array | np.ndarray]:
    """Arrays by path as ``like`` says, on its shardings, or in numpy where it has numpy arrays.

    Args:
      verified: the files are those that were written; else an error in them is damage.
    """
    try:
        manifest = read_manifest(folder)
        if manifest.pieces:
            return pieces.load(folder, manifest, like)
        return layout.load(folder, like)
    except (OSError, ValueError, KeyError) as error:
        if verified:
            raise  # the files are those that were written: not damage
        reason = " ".join(str(error).split())[:200]
        raise DamagedCheckpoint(f"{folder}: checkpoint damaged, Orbax cannot read it ({reason})") from error
