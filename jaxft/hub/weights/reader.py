"""Finding and opening weights: the one place that knows file names."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from jaxft.errors import UserError
from jaxft.hub.weights.contract import Weights
from jaxft.hub.weights.flax_file import FlaxFile
from jaxft.hub.weights.safetensors_file import SafetensorsFile
from jaxft.hub.weights.shards import ShardedWeights
from jaxft.hub.weights.torch_file import TorchFile

_OF_SUFFIX: dict[str, Callable[[Path], Weights]] = {
    ".safetensors": SafetensorsFile,
    ".bin": TorchFile,
    ".pt": TorchFile,
    ".pth": TorchFile,
    ".msgpack": FlaxFile,
}
_INDEX = ".index.json"

LOOKED_FOR = tuple(
    name + ending
    for name in ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
    for ending in ("", _INDEX)
)


def open_weights(folder_or_file: Path) -> Weights:
    """Opens a weights file, an index of shards, or the first of LOOKED_FOR that a folder has.

    Raises:
      UserError: nothing was found, or what was found is not a well-formed weights file.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        path = _find_in(path)
    elif not os.path.lexists(path):
        raise UserError(f"{path} does not exist; name a weights file or a folder with one of {', '.join(LOOKED_FOR)}")
    return _opener_of(path)(path)


def _find_in(folder: Path) -> Path:
    for name in LOOKED_FOR:
        # lexists: a dangling link (a half-removed cache) is an error to report, not a reason to try the next name.
        if os.path.lexists(folder / name):
            return folder / name
    raise UserError(f"{folder} has no weights file; looked for {', '.join(LOOKED_FOR)}")


def _opener_of(path: Path) -> Callable[[Path], Weights]:
    single = _OF_SUFFIX.get(Path(path.name.removesuffix(_INDEX)).suffix)
    if single is None:
        endings = ", ".join((*_OF_SUFFIX, *(suffix + _INDEX for suffix in _OF_SUFFIX)))
        raise UserError(f"{path} is not known as a weights file by its name; it must end in one of {endings}")
    return functools.partial(ShardedWeights, open_shard=single) if path.name.endswith(_INDEX) else single
