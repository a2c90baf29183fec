"""Checkpoints that survive crashes, bit rot, library upgrades and a change of devices.

A step folder is written by Orbax; ``jaxft.json`` with the hash of every file is written last. Names are loaded on first
use: :func:`read_manifest` alone (to inspect a checkpoint) imports neither jax nor Orbax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxft.checkpoint.apart import RunBucket
    from jaxft.checkpoint.beside import find_tokenizer, tokenizer_place
    from jaxft.checkpoint.bucket import local_model, run_folder
    from jaxft.checkpoint.folders import nothing_usable, step_folders
    from jaxft.checkpoint.manifest import DamagedCheckpoint, FileSpec, LeafSpec, Manifest, read_manifest
    from jaxft.checkpoint.params import StoredArray, is_checkpoint, open_params, restore_params, save_params
    from jaxft.checkpoint.store import Checkpoints, Restored

_HOME = {
    "Checkpoints": "store",
    "DamagedCheckpoint": "manifest",
    "FileSpec": "manifest",
    "LeafSpec": "manifest",
    "Manifest": "manifest",
    "Restored": "store",
    "RunBucket": "apart",
    "StoredArray": "params",
    "find_tokenizer": "beside",
    "is_checkpoint": "params",
    "local_model": "bucket",
    "nothing_usable": "folders",
    "open_params": "params",
    "read_manifest": "manifest",
    "restore_params": "params",
    "save_params": "params",
    "run_folder": "bucket",
    "step_folders": "folders",
    "tokenizer_place": "beside",
}

__all__ = [
    "Checkpoints",
    "DamagedCheckpoint",
    "FileSpec",
    "LeafSpec",
    "Manifest",
    "Restored",
    "RunBucket",
    "StoredArray",
    "find_tokenizer",
    "is_checkpoint",
    "local_model",
    "nothing_usable",
    "open_params",
    "read_manifest",
    "restore_params",
    "run_folder",
    "save_params",
    "step_folders",
    "tokenizer_place",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
