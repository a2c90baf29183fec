"""Batches whose content is a pure function of (seed, step).

There is no iterator state to save: resuming at step n reads batch n, at once, on any number of processes. Each epoch is one
seeded shuffle of the split (Grain's index shuffle: O(1) memory), cut into windows; inside a window rows are sorted by
length and cut into batches, and the batches of a window are shuffled. So rows of similar length share a batch, every row
is seen exactly once per epoch, and a batch has one of a few declared lengths ("buckets"). Where a field asks for it, rows of a
window that share one of its values are dealt into different batches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.data.apart import keep_apart
from jaxft.data.batch import Example, Fields, HostBatch, Shape, collate
from jaxft.data.examples import Examples
from jaxft.data.rendering import Rendering, lengths_of, rng_of
from jaxft.parallel.sharding import AxisRules, batch_sharding

_WINDOW = 50  # batches per window: wide enough for tight buckets, narrow enough to stay a good shuffle


@dataclass(frozen=True, eq=False)
class Batches:
    """Random access to the batches of a split, ``batches[step]``: its fields, padded; rows of weight 0 fill up an epoch's last one.

    Rows of similar length share a batch, by the axis ``length``; examples without one are all of one shape.
    """

    split: Examples
    batch_size: int
    buckets: tuple[int, ...]
    seed: int | None
    """Seed of the shuffle; None: one epoch in order of length, for evaluation (sums do not care, and little is padded)."""
    part: tuple[int, int] | None = None
    """(first, last + 1): which rows of each batch this process makes; None: all."""
    left_out: tuple[tuple[int, int], ...] = ()
    """(step, count): so many batches are left out before that of a step, which all later ones move up by."""
    rendering: Rendering | None = None
    """What examples are made by when they are wanted; None: they are stored as batches hold them."""

    def __post_init__(self) -> None:
        longest = int(self._lengths.max())
        if longest > self.buckets[-1]:
            raise ValueError(f"{self.split.name}: a row of {longest} tokens is beyond {self.buckets}")

    @property
    def fields(self) -> Fields:
        """Fields of a batch."""
        return self.split.fields if self.rendering is None else self.rendering.fields

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return lengths_of(self.split)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every row once."""
        return -(-len(self.split) // self.batch_size)

    def __len__(self) -> int:
        # Grain wants a finite length; a trained run is shorter than this.
        return self.steps_per_epoch if self.seed is None else 1 << 40

    def __getitem__(self, step: int) -> HostBatch:
        first, last = self.part or (0, self.batch_size)
        shape, epoch = replace(self.shape_of(int(step)), rows=last - first), self._place(int(step))[0]
        return collate([self._example(i, epoch) for i in self.rows_of(int(step))[first:last]], self.fields, shape)

    def _example(self, row: int, epoch: int) -> Example:
        stored = self.split[row]
        if self.rendering is None:
            return stored
        return self.rendering.rendered(stored, None if self.seed is None else rng_of(self.seed, epoch, int(row)))

    def shape_of(self, step: int) -> Shape:
        """The padded shape of the global batch of a step."""
        longest = int(self._lengths[self.rows_of(step)].max())
        return self._shape(bucket_of(longest, self.buckets))

    def rows_of(self, step: int) -> np.ndarray:
        """Row numbers of the global batch of a step; fewer than ``batch_size`` in an epoch's last batch."""
        epoch, index = self._place(step)
        if self.seed is None:
            return _by_length(self)[index * self.batch_size : (index + 1) * self.batch_size]
        window, within = divmod(index, _WINDOW)
        return _window(self, epoch, window)[within]

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch, batch of it) of a step."""
        moved = sum(count for first, count in self.left_out if step >= first)
        return divmod(step + moved, self.steps_per_epoch)

    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that batches of this split can have."""
        lengths = self._lengths
        shortest, longest = (bucket_of(int(size), self.buckets) for size in (lengths.min(), lengths.max()))
        return tuple(self._shape(length) for length in self.buckets if shortest <= length <= longest)

    def upcoming(self, step: int) -> tuple[Shape, ...]:
        """The shapes that batches can have, those first that may come from a step on."""
        del step
        return self.shapes()

    def _shape(self, length: int) -> Shape:
        named = any("length" in field.axes for field in self.fields.values())
        fixed = () if self.rendering is None else tuple(self.rendering.sizes.items())
        own = (("length", length),) if named else ()
        return Shape(self.batch_size, (*own, *self._other_sizes[length], *fixed))

    @functools.cached_property
    def _other_sizes(self) -> dict[int, tuple[tuple[str, int], ...]]:
        """Axes besides ``length`` by bucket, with the most that any row has which fits there: rows that are short along one axis are often
        short along the others."""
        fixed = {} if self.rendering is None else self.rendering.sizes
        axes = dict.fromkeys(axis for field in self.fields.values() for axis in field.axes[1:] if axis not in fixed)
        others = [(axis, self.split.sizes(axis)) for axis in axes if isinstance(axis, str) and axis != "length"]
        lengths = self._lengths
        return {
            bucket: tuple((axis, int(sizes.max(initial=1, where=lengths <= bucket))) for axis, sizes in others)
            for bucket in self.buckets
        }


@functools.lru_cache(maxsize=64)
def _shuffled(rows: int, seed: int) -> grain.MapDataset[int]:
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat()


@functools.lru_cache(maxsize=2)
def _by_length(batches: Batches) -> np.ndarray:
    return np.argsort(lengths_of(batches.split), kind="stable")


@functools.lru_cache(maxsize=8)
def _window(batches: Batches, epoch: int, window: int) -> list[np.ndarray]:
    """The rows of each batch of one window."""
    rows, size, seed = len(batches.split), batches.batch_size, batches.seed
    assert seed is not None
    order = _shuffled(rows, seed)
    first, last = window * _WINDOW * size, min((window + 1) * _WINDOW * size, rows)
    members = np.array([order[epoch * rows + i] for i in range(first, last)], np.int64)
    rng = np.random.default_rng([seed, epoch, window])
    # A stable sort keeps the shuffled order among equal lengths. The short batch, if any, is cut at a random place: were it
    # always the longest rows, the epoch would end with the hardest ones.
    members = members[np.argsort(lengths_of(batches.split)[members], kind="stable")]
    full, rest = divmod(len(members), size)
    sizes = [size] * full + ([rest] if rest else [])
    if rest:
        place = int(rng.integers(full + 1))
        sizes[place], sizes[-1] = sizes[-1], sizes[place]
    cuts = np.split(members, np.cumsum(sizes)[:-1])
    if names := [name for name, field in batches.split.fields.items() if field.apart]:
        cuts = keep_apart(cuts, functools.partial(_values_of, batches.split, names))
    # Every batch but the epoch's last is full, so that (step -> rows) needs no table.
    short = [cut for cut in cuts if len(cut) < size]
    whole = [cut for cut in cuts if len(cut) == size]
    return [whole[i] for i in rng.permutation(len(whole))] + short


def _values_of(split: Examples, names: list[str], row: int) -> frozenset[int]:
    example = split[row]
    return frozenset(value for name in names for value in np.ravel(example[name]).tolist() if value >= 0)


def bucket_of(length: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds ``length``."""
    return next(bucket for bucket in buckets if bucket >= length)


def make_buckets(declared: tuple[int, ...] | None, max_length: int) -> tuple[int, ...]:
    """The padded lengths of a run: as declared, or powers of two from 16 below ``max_length``, and ``max_length``."""
    if declared is not None:
        return tuple(sorted(set(declared)))
    return tuple(1 << p for p in range(4, 20) if 1 << p < max_length) + (max_length,)


def stream(batches: Batches, start: int, stop: int, read_ahead: int) -> Iterator[HostBatch]:
    """Batches ``start`` to ``stop - 1``, prepared by background threads a few ahead of their use."""
    if start >= stop:
        return iter(())
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=read_ahead)
    source = cast(Sequence[HostBatch], batches)  # random access by __len__ and __getitem__ is all that Grain asks for
    return iter(grain.MapDataset.source(source)[start:stop].to_iter_dataset(options))


def local_rows(mesh: Mesh, rules: AxisRules, batch_size: int) -> tuple[int, int]:
    """(first, last + 1): the rows of a batch that this process's devices hold parts of."""
    places = batch_sharding(mesh, rules, ("batch",)).addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size)[:2] for index in places if index is not None]
    return min(first for first, _ in bounds), max(last for _, last in bounds)


def to_global(batch: HostBatch, fields: Fields, mesh: Mesh, rules: AxisRules, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows (:func:`local_rows`) as part of global arrays, split as the rules say."""
    shardings = {name: batch_sharding(mesh, rules, fields[name].axes) for name in batch}
    if len(mesh.local_devices) == mesh.size:
        return jax.device_put(batch, shardings)
    first, _ = local_rows(mesh, rules, batch_size)

    def part(value: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return value[(slice(start - first, stop - first), *index[1:])]

    return {
        name: jax.make_array_from_callback(
            (batch_size, *value.shape[1:]), shardings[name], functools.partial(part, value)
        )
        for name, value in batch.items()
    }
