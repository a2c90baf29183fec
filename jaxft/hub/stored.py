"""Parameters of ours in an open checkpoint: read by the rows that are kept, into the part of each device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxft.hub.weights import Weights
from jaxft.hub.weights.numbers import copy_rounded, is_finite
from jaxft.models.layout import Rule

_BLOCK_BYTES = 64 << 20  # of a tensor that are read at a time


@dataclass(frozen=True)
class Source:
    """The tensors that hold one parameter."""

    rule: Rule
    names: list[str]
    """In the file, one per layer."""
    rows: tuple[int, int] | None
    """First row and end of the parameter in each, where it is a part of them; None: it is the whole tensor."""


class Stored:
    """The tensors of one parameter in an open checkpoint."""

    def __init__(self, weights: Weights, source: Source, shape: tuple[int, ...], non_finite: list[str]) -> None:
        self.weights, self.rule, self.names, self.shape = weights, source.rule, source.names, shape
        self._rows, self._non_finite = source.rows, non_finite

    def tensor(self, layer: int) -> np.ndarray:
        """One layer (or the whole, where it has no layers), arranged as ours."""
        return self._read(layer, self._rows, self.rule.one(self.shape))

    def blocks(self, layer: int, parts: Sequence[tuple[slice, ...]]) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """One layer, arranged as ours, as far as parts of it need it: some rows of theirs at a time.

        Args:
          parts: indices of ours in one layer, with a start and an end in each dimension.

        Returns: (where in ours a block lies, the block); blocks come in order and do not overlap.
        """
        shape = self.rule.one(self.shape)
        if not shape:
            yield (), self.tensor(layer)
            return
        dim, rows = self.rule.arrangement(len(shape)).blocks(shape)
        others = math.prod(shape[:dim] + shape[dim + 1 :]) * self.weights.dtype(self.names[layer]).itemsize
        # Rows of a matrix that is stored the other way round lie all over it: it is read once.
        most = shape[dim] if self.rule.turned else max(1, _BLOCK_BYTES // others)
        begins = self._rows[0] if self._rows is not None else 0
        for first, end in _united((part[dim].start, part[dim].stop) for part in parts):
            for start in range(first, end, most):
                stop = min(start + most, end)
                block = (*shape[:dim], stop - start, *shape[dim + 1 :])
                where = tuple(slice(start, stop) if i == dim else slice(0, size) for i, size in enumerate(shape))
                yield where, self._read(layer, (begins + start * rows, begins + stop * rows), block)

    def _read(self, layer: int, rows: tuple[int, int] | None, shape: tuple[int, ...]) -> np.ndarray:
        name = self.names[layer]
        stored = self._read_rows(name, rows)
        if not is_finite(stored) and name not in self._non_finite:
            self._non_finite.append(name)
        grid, there = self.rule.grid, self.rule.stored
        if self.rule.resampled and grid is not None and there is not None:
            stored = grid.resampled(stored, there)
        return self.rule.arrangement(len(shape)).to_ours(stored, shape)

    def _read_rows(self, name: str, rows: tuple[int, int] | None) -> np.ndarray:
        if self.rule.turned:
            return self.weights.read(name).T[slice(*rows) if rows is not None else slice(None)]
        return self.weights.read(name) if rows is None else self.weights.read_rows(name, *rows)


def _united(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The places that any of the spans has, as few spans in order."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


class StoredParam:
    """One of our parameters in an open checkpoint, read when it is used and not kept."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self.shape = stored.shape
        self.dtypes = tuple(stored.weights.dtype(name) for name in stored.names)
        """Stored type of each layer."""

    def __getitem__(self, layer: int) -> np.ndarray:
        return self._stored.tensor(layer)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        stacked = self._stored.rule.stacked
        whole = np.stack([self[i] for i in range(self.shape[0])]) if stacked else self._stored.tensor(0)
        return whole if dtype is None else whole.astype(dtype)


def load_param(stored: Stored, sharding: jax.sharding.Sharding | None, dtype: DTypeLike) -> jax.Array:
    """One parameter: what the devices of this process keep of it is read once, and copied into the part of each."""
    shape = stored.shape
    whole = {None: (slice(None),) * len(shape)}
    indices = whole if sharding is None else dict(sharding.addressable_devices_indices_map(shape))
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    keys = {device: _index_key(index, shape) for device, index in indices.items()}
    for key in keys.values():
        if key not in parts:
            parts[key] = _aligned_empty(tuple(stop - start for start, stop in key), dtype)
    fill(stored, parts)
    # Without a device the array is not committed to one: a step that is jitted over it compiles once, not again for its own results.
    arrays = [jax.device_put(parts[keys[device]], device) for device in indices]
    if sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def fill(stored: Stored, parts: Mapping[tuple[tuple[int, int], ...], np.ndarray]) -> None:
    """Fills parts of a parameter, by the start and the end of each in every dimension."""
    stacked, path = stored.rule.stacked, stored.weights.path
    for layer, name in enumerate(stored.names):
        of_layer: list[tuple[tuple[slice, ...], np.ndarray]] = []
        for key, part in parts.items():
            index = tuple(slice(*span) for span in key)
            if not stacked:
                of_layer.append((index, part))
            elif index[0].start <= layer < index[0].stop:
                of_layer.append((index[1:], part[layer - index[0].start]))
        for where, block in stored.blocks(layer, [index for index, _ in of_layer]):
            for index, part in of_layer:
                here = [_shared(of_part, of_block) for of_part, of_block in zip(index, where, strict=True)]
                if all(into is not None for into in here):
                    into, out_of = (tuple(both[i] for both in here if both is not None) for i in (0, 1))
                    copy_rounded(part[into], block[out_of], name, path)


def _shared(part: slice, block: slice) -> tuple[slice, slice] | None:
    """Where the places that two slices have in common lie in each; None: there are none."""
    start, stop = max(part.start, block.start), min(part.stop, block.stop)
    if start >= stop:
        return None
    return slice(start - part.start, stop - part.start), slice(start - block.start, stop - block.start)


def _index_key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Memory that XLA's CPU backend takes over without a copy: it wants 64-byte alignment."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
