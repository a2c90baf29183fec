"""A state in parts: each process writes what it holds of every array into a file of its own, and no other file is needed for that.

So processes that see nothing of each other's disks can store a state together. A piece of an array that several processes hold is
written by one of them, the one that has least to write so far. ``<group>/part-<process>`` holds the pieces of a group's arrays one after
the other, C-contiguous, little-endian, each at a multiple of 64 bytes; ``jaxft.json`` says where each lies. Whoever restores reads the
files that have something of its own share, on any mesh and number of processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint.layout import Shaped, stored_path
from jaxft.checkpoint.manifest import DamagedCheckpoint, LeafSpec, Manifest, Piece

if sys.byteorder != "little":  # arrays are handed to files as they lie in memory
    raise ImportError("jaxft.checkpoint needs a little-endian machine")

_ALIGNED = 64


class Share(NamedTuple):
    """What one process writes."""

    pieces: dict[str, list[Piece]]
    """The pieces of all processes, by the path of their array."""
    files: dict[str, list[tuple[int, np.ndarray]]]
    """By the name of a file of this process: arrays, and the byte that each begins at."""


def this_process() -> int:
    """The number of this process."""
    return jax.process_index()


def processes() -> int:
    """How many there are."""
    return jax.process_count()


def process_of(device: jax.Device) -> int:
    """The process that a device is of."""
    return device.process_index


def part_name(path: str, part: int) -> str:
    """The file of a process's pieces of an array."""
    return f"{stored_path(path).partition('/')[0]}/part-{part:05d}"


def share_of(flat: Mapping[str, jax.Array | np.ndarray]) -> Share:
    """Who writes what of a state, the same in all processes; with copies of what this process writes, which outlive the arrays.

    Args:
      flat: arrays by path, in the same order in all processes. One in numpy is held by all.
    """
    written: dict[int, int] = dict.fromkeys(range(processes()), 0)
    ends: dict[str, int] = {}
    share = Share({}, {})
    for path, leaf in flat.items():
        pieces = []
        for start, stop, holders in _held(leaf):
            part = min(holders, key=lambda one: (written[one], one))
            size = math.prod(b - a for a, b in zip(start, stop, strict=True)) * leaf.dtype.itemsize
            name = part_name(path, part)
            begin = -(-ends.get(name, 0) // _ALIGNED) * _ALIGNED
            ends[name], written[part] = begin + size, written[part] + size
            pieces.append(Piece(start, stop, part, begin))
            if part == this_process():
                share.files.setdefault(name, []).append((begin, _copy(leaf, start, stop)))
        share.pieces[path] = pieces
    return share


def _held(leaf: jax.Array | np.ndarray) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], list[int]]]:
    """The pieces that an array lies in: where each begins and ends, and the processes that hold it."""
    if isinstance(leaf, np.ndarray):
        yield (0,) * leaf.ndim, leaf.shape, list(range(processes()))
        return
    holders: dict[tuple[tuple[int, ...], tuple[int, ...]], set[int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        holders.setdefault(_bounds(index, leaf.shape), set()).add(process_of(device))
    for (start, stop), held in sorted(holders.items()):
        yield start, stop, sorted(held)


def _bounds(index: Sequence[slice] | None, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = [one.indices(size)[:2] for one, size in zip(index or (), shape, strict=True)]
    return tuple(a for a, _ in found), tuple(b for _, b in found)


def _copy(leaf: jax.Array | np.ndarray, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    shard = next(one for one in leaf.addressable_shards if _bounds(one.index, leaf.shape) == (start, stop))
    return np.array(shard.data)


def write(folder: Path, share: Share) -> None:
    """Writes this process's files of a state; ``folder`` is made."""
    for name, arrays in share.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for begin, array in arrays:
                file.write(b"\0" * (begin - file.tell()))
                file.write(array.reshape(-1).view(np.uint8).data)


def size_of(share: Share) -> int:
    """Bytes that this process writes."""
    return sum(begin + array.nbytes for arrays in share.files.values() for begin, array in arrays[-1:])


def files_for(manifest: Manifest, like: Mapping[str, Shaped]) -> set[str]:
    """The files that hold something of what this process restores."""
    return {
        part_name(path, piece.part)
        for path, leaf in like.items()
        for start, stop in _wanted(leaf)
        for piece in manifest.pieces[path]
        if _overlap(piece, start, stop) is not None
    }


def load(folder: Path, manifest: Manifest, like: Mapping[str, Shaped]) -> dict[str, jax.Array | np.ndarray]:
    """Arrays by path as ``like`` says: on its shardings, or in numpy where it has numpy arrays.

    Raises:
      DamagedCheckpoint: the manifest names places that its files do not have.
    """
    for path in like:
        item = jnp.dtype(manifest.tree[path].dtype).itemsize
        for piece in manifest.pieces[path]:
            file = manifest.files.get(part_name(path, piece.part))
            if file is None or piece.offset + math.prod(_shape(piece)) * item > file.size:
                raise DamagedCheckpoint(
                    f"{folder}: checkpoint damaged: {path} is not where its manifest says; use another checkpoint"
                )
    return {path: _load(folder, path, manifest, leaf) for path, leaf in like.items()}


def _load(folder: Path, path: str, manifest: Manifest, leaf: Shaped) -> jax.Array | np.ndarray:
    spec, pieces = manifest.tree[path], manifest.pieces[path]
    if isinstance(leaf, np.ndarray):
        return _assembled(folder, path, spec, pieces, (0,) * len(spec.shape), spec.shape)
    made: dict[object, np.ndarray] = {}

    def part(index: Sequence[slice] | None) -> np.ndarray:
        bounds = _bounds(index, spec.shape)
        if bounds not in made:
            made[bounds] = _assembled(folder, path, spec, pieces, *bounds)
        return made[bounds]

    if leaf.sharding is None:
        raise ValueError(f"{path}: restoring needs an explicit sharding for every array")
    return jax.make_array_from_callback(spec.shape, leaf.sharding, part)


def _wanted(leaf: Shaped) -> Collection[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The parts of an array that this process holds."""
    if isinstance(leaf, np.ndarray) or leaf.sharding is None:
        return [((0,) * len(leaf.shape), tuple(leaf.shape))]
    mine = leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape))
    return {_bounds(index, leaf.shape) for index in mine.values()}


def _overlap(piece: Piece, start: Sequence[int], stop: Sequence[int]) -> list[tuple[int, int]] | None:
    """What a piece has of a part, along each axis; None: nothing."""
    common = [
        (max(a, c), min(b, d)) for a, b, c, d in zip(piece.start, piece.stop, start, stop, strict=True)
    ]  # fmt: skip
    return common if all(a < b for a, b in common) else None


def _assembled(
    folder: Path, path: str, spec: LeafSpec, pieces: Sequence[Piece], start: tuple[int, ...], stop: tuple[int, ...]
) -> np.ndarray:
    dtype = jnp.dtype(spec.dtype)
    out = np.empty([b - a for a, b in zip(start, stop, strict=True)], dtype)
    for piece in pieces:
        if (common := _overlap(piece, start, stop)) is None:
            continue
        shape = _shape(piece)
        size = math.prod(shape) * dtype.itemsize
        # Mapped: of a piece that is larger than the part, only the part is read.
        stored = np.memmap(folder / part_name(path, piece.part), np.uint8, "r", piece.offset, (size,))
        stored = stored.view(dtype).reshape(shape)
        into = tuple(slice(a - c, b - c) for (a, b), c in zip(common, start, strict=True))
        out[into] = stored[tuple(slice(a - c, b - c) for (a, b), c in zip(common, piece.start, strict=True))]
    return out


def _shape(piece: Piece) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip(piece.start, piece.stop, strict=True))
