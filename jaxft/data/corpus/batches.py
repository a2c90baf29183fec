"""Batches of rows of corpora: a pure function of (seed, step), without an index of the rows in memory."""

from __future__ import annotations

import abc
import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int32, Int64

from jaxft.data.batch import Example, Fields, HostBatch, Shape, text_shape
from jaxft.data.corpus.course import Course
from jaxft.data.corpus.mixture import Mixture
from jaxft.data.corpus.reading import Rows, Source
from jaxft.data.loader import Batches

S = TypeVar("S", bound=Source)


@dataclass(frozen=True, eq=False)
class StreamOf(Generic[S]):
    """Rows of one corpus, or of several that are mixed, as :class:`~jaxft.data.examples.Examples`: numbered from 0, as an epoch without a
    shuffle has them."""

    name: str
    fields: Fields
    """Fields of batches."""
    sources: tuple[S, ...]
    mixture: Mixture
    digests: tuple[str, ...]
    """A hash of the tokens of each source."""

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.sources[0].length

    def __len__(self) -> int:
        return sum(source.count for source in self.sources)

    def sizes(self, axis: str) -> np.ndarray:
        """[rows] int64, how many tokens each has room for."""
        if axis != "length":
            raise KeyError(axis)
        return np.broadcast_to(np.int64(self.length), (len(self),))

    def __getitem__(self, index: int) -> Example:
        row = self.batch(np.array([index]), None)
        size = int(row["mask"].sum())
        return {name: value[0, :size] for name, value in row.items() if name not in ("weights", "mask")}

    def digest(self) -> str:
        """A hash of the corpora, and of how their tokens become rows."""
        how = [[type(source).__name__, source.length, *source.said()] for source in self.sources]
        said = json.dumps([self.digests, how, self.mixture.said()])
        return f"corpus-{hashlib.sha256(said.encode()).hexdigest()}"

    @abc.abstractmethod
    def batch(self, places: Int64[np.ndarray, " B"], seed: int | None, parts: int = 1) -> HostBatch:
        """Rows of all that are read one after the other, padded.

        Args:
          places: which ones; -1: a row that only fills up.
          seed: of the order; None: as the corpora have them.
          parts: shorter rows, one after the other, that each of them is cut into.
        """


class Stream(StreamOf[Rows]):
    """Rows of documents, several in each."""

    def batch(self, places: Int64[np.ndarray, " B"], seed: int | None, parts: int = 1) -> HostBatch:
        """See :meth:`StreamOf.batch`."""
        count = len(places)
        tokens = np.full((count, self.length), self.fields["tokens"].fill, np.int32)
        begins, sizes = np.zeros((count, self.length), np.int32), np.zeros(count, np.int64)
        chosen, rows = self.mixture.rows_of(places, [source.count for source in self.sources])
        for number, source in enumerate(self.sources):
            of = np.flatnonzero((chosen == number) & (places >= 0))
            if len(of) == count:
                sizes = source.fill(rows, seed_of(seed, number), tokens, begins)
            elif len(of):
                some, marks = tokens[of], begins[of]
                sizes[of] = source.fill(rows[of], seed_of(seed, number), some, marks)
                tokens[of], begins[of] = some, marks
        length = self.length // parts
        tokens, begins = tokens.reshape(-1, length), begins.reshape(-1, length)
        sizes = np.clip(sizes[:, None] - np.arange(parts) * length, 0, length).ravel()
        segments, positions = _places(begins)
        there = (np.arange(length, dtype=np.int32) < sizes[:, None]).astype(np.int32)
        if sizes.min() < length:
            segments, positions = segments * there, positions * there
        return {
            "tokens": tokens,
            "mask": there,
            "types": np.zeros_like(tokens),
            "weights": (sizes > 0).astype(np.float32),
            "segments": segments,
            "positions": positions,
        }


def _places(begins: Int32[np.ndarray, "B S"]) -> tuple[Int32[np.ndarray, "B S"], Int32[np.ndarray, "B S"]]:
    """(which document of its row each token is of, from 1; its place in that one, from 0); what follows a row's last document is of it."""
    begins[:, 0] = 1
    first = np.flatnonzero(begins).astype(np.int32)
    row = first // begins.shape[1]
    number = np.arange(len(first), dtype=np.int32)
    number -= number[np.searchsorted(row, row)] - 1
    sizes = np.diff(first, append=np.int32(begins.size))
    positions = np.arange(begins.size, dtype=np.int32) - np.repeat(first, sizes)
    return np.repeat(number, sizes).reshape(begins.shape), positions.reshape(begins.shape)


def seed_of(seed: int | None, source: int) -> int | None:
    """A seed of its own for each source: two copies of one corpus are not read in step."""
    return None if seed is None else seed + (source << 32)


@dataclass(frozen=True, eq=False)
class StreamBatches(Batches):
    """Random access to the batches of a stream, ``batches[step]``. Epochs follow each other without a gap; only where nothing is
    shuffled, for evaluation, has the last batch rows that fill it up."""

    course: Course | None = None
    """What each step reads; None: ``batch_size`` rows."""

    def __post_init__(self) -> None:
        """Every row has one length."""

    @functools.cached_property
    def stream(self) -> StreamOf:
        """The rows."""
        assert isinstance(self.split, StreamOf)
        return self.split

    def __getitem__(self, step: int) -> HostBatch:
        if self.course is not None:
            return self._staged(self.course, int(step))
        first, last = self.part or (0, self.batch_size)
        places = np.full(self.batch_size, -1, np.int64)
        rows = self.rows_of(int(step))
        places[: len(rows)] = rows
        return self.stream.batch(places[first:last], self.seed)

    def rows_of(self, step: int) -> np.ndarray:
        """The places of a batch's rows among all that are read one after the other; in a stage of shorter rows, among those."""
        if self.course is not None:
            stage = self.course.at(step)
            return np.arange(stage.blocks * stage.parts) + self._first_block(self.course, step) * stage.parts
        moved = sum(count for first, count in self.left_out if step >= first)
        first = (step + moved) * self.batch_size
        last = first + self.batch_size
        return np.arange(first, last if self.seed is not None else min(last, len(self.stream)))

    def shape_of(self, step: int) -> Shape:
        """The shape of a batch: one for all, or one for each stage."""
        if self.course is not None:
            return self.course.shape(self.course.at(step))
        return text_shape(self.batch_size, self.stream.length)

    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that batches have, in the order of the stages."""
        return (self.shape_of(0),) if self.course is None else self.course.shapes()

    def upcoming(self, step: int) -> tuple[Shape, ...]:
        """The shapes of the stages from a step on; last those of stages that are over, for a run that goes back."""
        if self.course is None:
            return self.shapes()
        now = self.course.stages.index(self.course.at(step))
        return tuple(dict.fromkeys(map(self.course.shape, (*self.course.stages[now:], *self.course.stages[:now]))))

    def _first_block(self, course: Course, step: int) -> int:
        """The first block that a step reads; steps that are left out would have read those before."""
        moved = sum(
            course.blocks_before(first + count) - course.blocks_before(first)
            for first, count in self.left_out
            if step >= first
        )
        return course.blocks_before(step) + moved

    def _staged(self, course: Course, step: int) -> HostBatch:
        stage = course.at(step)
        rows = stage.blocks * stage.parts
        # Devices have equal shares of a batch, however many rows it has.
        first, last = (rows * place // self.batch_size for place in self.part or (0, self.batch_size))
        begin, end = first // stage.parts, -(-last // stage.parts)
        places = self._first_block(course, step) + np.arange(begin, end)
        batch = self.stream.batch(places, self.seed, stage.parts)
        mine = slice(first - begin * stage.parts, last - begin * stage.parts)
        return {name: value[mine] for name, value in batch.items()}
