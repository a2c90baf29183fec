"""Corpora read as pairs of texts, a row each: random access without a table of rows, as :mod:`jaxft.data.corpus.reading` has it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxft.data.batch import HostBatch
from jaxft.data.corpus.batches import StreamOf, seed_of
from jaxft.data.corpus.order import uniforms
from jaxft.data.corpus.pairs import FRAME, LEAST, Pair, Pairing, pieces_of
from jaxft.data.corpus.reading import order_of
from jaxft.data.corpus.store import Corpus

_BLOCK = 1024
"""Documents whose rows are counted together."""


class _Place(NamedTuple):
    """Where a row's piece is."""

    document: int
    number: int
    """The piece's number in its document."""
    first: int
    """The document's first row."""
    rows: int
    """The document's rows."""


@dataclass(frozen=True, eq=False)
class Paired:
    """Rows of pairs: each document's pieces, one after the other, numbered from 0 without end as those of
    :class:`~jaxft.data.corpus.reading.Rows`. What is drawn follows from the seed, the epoch and the row's place in the corpus."""

    corpus: Corpus
    length: int
    pairing: Pairing

    def said(self) -> list[object]:
        """What the pairing says of itself."""
        return self.pairing.said()

    @property
    def room(self) -> int:
        """Tokens of both texts, at most."""
        return self.length - FRAME

    @property
    def longest(self) -> int:
        """Tokens of the longest document that is in one row."""
        return self.room + self.frame

    @functools.cached_property
    def frame(self) -> int:
        """Tokens that documents have around their text."""
        document = self.corpus.document(0)
        text = self.pairing.text_of(document)
        return len(document) - (text.stop - text.start)

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return int(self._before[-1])

    @property
    def needs(self) -> int:
        """Documents without which there are no such pairs."""
        return 2 if self.pairing.kind == "next" else 1

    @property
    def short(self) -> int:
        """Documents that are too short to be parted."""
        sizes, counts = self.corpus.lengths.T
        return int(counts[sizes - self.frame < 2 * LEAST].sum())

    @functools.cached_property
    def _before(self) -> Int64[np.ndarray, " blocks+1"]:
        """Rows before each block of documents."""
        found = [
            int(self._rows(self._sizes(first, min(first + _BLOCK, self.corpus.documents))).sum())
            for first in range(0, self.corpus.documents, _BLOCK)
        ]
        return np.cumsum([0, *found], dtype=np.int64)

    def _rows(self, sizes: np.ndarray) -> np.ndarray:
        texts = sizes - self.frame
        return np.where(texts >= 2 * LEAST, -(-texts // self.room), 0)

    def _sizes(self, first: int, last: int) -> np.ndarray:
        """[documents] the tokens of some documents."""
        found, begun = [], self.corpus.first_document
        shard = int(begun.searchsorted(first, "right")) - 1
        while first < last:
            stop = min(last, int(begun[shard + 1]))
            base = int(begun[shard])
            found.append(np.diff(self.corpus.shards[shard].offsets[first - base : stop - base + 1]))
            first, shard = stop, shard + 1
        return np.concatenate(found).astype(np.int64)

    def _place(self, row: int) -> _Place:
        block = int(self._before.searchsorted(row, "right")) - 1
        first = block * _BLOCK
        rows = self._rows(self._sizes(first, min(first + _BLOCK, self.corpus.documents)))
        ends = np.cumsum(rows)
        within = row - int(self._before[block])
        at = int(ends.searchsorted(within, "right"))
        begun = int(ends[at] - rows[at])
        return _Place(first + at, within - begun, int(self._before[block]) + begun, int(rows[at]))

    def _piece(self, place: _Place) -> np.ndarray:
        document = self.corpus.document(place.document)
        text = document[self.pairing.text_of(document)]
        assert pieces_of(len(text), self.room) == place.rows
        return self.pairing.piece(
            lambda first, last: np.asarray(text[first:last], np.int32), len(text), place.number, self.room
        )

    def pair(self, row: int, seed: int | None) -> Pair:
        """A row.

        Args:
          row: its number.
          seed: of the order and of what is drawn; None: in the corpus's order, and always the same.
        """
        epoch, place = divmod(row, self.count)
        at = place if seed is None else order_of(self.count, seed, epoch, place)
        here = self._place(at)

        def other(draw: float) -> np.ndarray:
            chosen = int(draw * (self.count - here.rows))
            return self._piece(self._place(chosen + (here.rows if chosen >= here.first else 0)))

        draws = uniforms((0, 0, at) if seed is None else (seed, epoch, at))
        return self.pairing.pair(self._piece(here), self.room, draws, other)


class PairStream(StreamOf[Paired]):
    """Rows of pairs of one corpus, or of several that are mixed."""

    def batch(self, places: Int64[np.ndarray, " B"], seed: int | None, parts: int = 1) -> HostBatch:
        """See :meth:`StreamOf.batch`; pairs are in no parts."""
        assert parts == 1
        shape = (len(places), self.length)
        tokens = np.full(shape, self.fields["tokens"].fill, np.int32)
        mask, types, labels = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(len(places), np.int32)
        chosen, rows = self.mixture.rows_of(places, [source.count for source in self.sources])
        for i in np.flatnonzero(places >= 0).tolist():
            number = int(chosen[i])
            pair = self.sources[number].pair(int(rows[i]), seed_of(seed, number))
            size = len(pair.tokens)
            tokens[i, :size], types[i, :size], mask[i, :size], labels[i] = pair.tokens, pair.types, 1, pair.label
        weights = (places >= 0).astype(np.float32)
        return {"tokens": tokens, "mask": mask, "types": types, "weights": weights, "labels": labels}
