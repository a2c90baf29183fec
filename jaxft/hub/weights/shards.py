"""Weights in several files: ``*.index.json`` says which file (shard) holds which tensor.

Index and shards must agree exactly. ``metadata.total_size`` is not checked: many published indexes have it wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from jaxft.errors import UserError
from jaxft.hub.weights.contract import Weights, check_name, corrupt, quoted
from jaxft.hub.weights.flax_file import FlaxFile
from jaxft.hub.weights.pread import RandomAccessFile
from jaxft.hub.weights.strict_json import parse_object

MAX_INDEX_BYTES = 100_000_000


class ShardedWeights(Weights):
    """The shards of an index, open, as one set of tensors."""

    def __init__(self, index: Path, open_shard: Callable[[Path], Weights]) -> None:
        # flax indexes were written with "/" between levels; all our flat names have ".".
        separator = "/" if open_shard is FlaxFile else None
        shard_of = _read_index(index, separator)
        with ExitStack() as opened:
            shards = {}
            for file_name in sorted(set(shard_of.values())):
                if not (index.parent / file_name).is_file():
                    raise UserError(
                        f"{index} names the shard {quoted(file_name)}, which is missing from {index.parent}; "
                        "download or copy it there"
                    )
                shards[file_name] = opened.enter_context(open_shard(index.parent / file_name))
            _check_agreement(index, shard_of, shards)
            self._shard_of = {name: shards[file_name] for name, file_name in shard_of.items()}
            specs = {name: shard.spec(name) for name, shard in self._shard_of.items()}
            formats = {shard.format for shard in shards.values()}
            super().__init__(index, formats.pop() if formats else "", specs)
            self._opened = opened.pop_all()

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        self._shard_of[name]._fill(name, rows, out)

    def close(self) -> None:
        """Closes all shards."""
        self._opened.close()


def _read_index(index: Path, separator: str | None) -> dict[str, str]:
    """The weight map: tensor name -> file name, every file name being that of a file beside the index."""
    file = RandomAccessFile(index)
    try:
        if file.size > MAX_INDEX_BYTES:
            raise corrupt(index, f"an index larger than {MAX_INDEX_BYTES} bytes is not one")
        raw = file.bytes_at(0, file.size)
    finally:
        file.close()
    weight_map = parse_object(raw, index, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise corrupt(index, "it has no weight_map from tensor names to file names")
    result: dict[str, str] = {}
    for key, file_name in weight_map.items():
        name = check_name(key, index) if separator is None else check_name(key, index).replace(separator, ".")
        if name in result:
            raise corrupt(index, f"the tensor {quoted(name)} appears twice")
        if not isinstance(file_name, str) or not _is_plain(file_name):
            shown = quoted(file_name) if isinstance(file_name, str) else "that is not text"
            raise UserError(f"{index} names a shard {shown}; a shard must be a plain file name beside the index")
        result[name] = file_name
    return result


def _is_plain(file_name: str) -> bool:
    """No folders, so that an index cannot make us open files elsewhere."""
    return (
        file_name not in ("", ".", "..")
        and not any(character in file_name for character in "/\\\0")
        and len(file_name) < 256
        and file_name.isprintable()
    )


def _check_agreement(index: Path, shard_of: dict[str, str], shards: dict[str, Weights]) -> None:
    held: dict[str, str] = {}
    for file_name, shard in shards.items():
        for name in shard.names():
            if name in held:
                raise UserError(
                    f"{index}: the tensor {quoted(name)} is in two shards, {quoted(held[name])} and "
                    f"{quoted(file_name)}; the files belong to different checkpoints: download all of them again"
                )
            held[name] = file_name
    for name, file_name in shard_of.items():
        if held.get(name) != file_name:
            raise UserError(
                f"{index} says that the tensor {quoted(name)} is in {quoted(file_name)}, but it is not there; "
                "download index and shards again"
            )
    for name, file_name in held.items():
        if name not in shard_of:
            raise UserError(
                f"{index} does not list the tensor {quoted(name)} of {quoted(file_name)}; "
                "download index and shards again"
            )
