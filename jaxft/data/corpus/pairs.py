"""Pairs of texts from documents, as BERT and ALBERT are pre-trained on: two stretches one after the other, or not.

A document is cut into pieces of at most a row's length, where sentences end; a piece is parted in two, again where a sentence ends. Half of
the pairs stay as they are; in the others the second text is a stretch of another document (``next``: Devlin et al. 2018), or the two are
swapped (``order``: Lan et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

PairKind = Literal["next", "order"]
Tokens = np.ndarray
FRAME = 3
"""Tokens of a row that are no text: one that begins it, and one behind each text."""
LEAST = 4
"""Tokens of a text."""
SHORTEST = FRAME + 8 * LEAST
"""Tokens that rows have room for, at least: a piece, half a row before its cuts move by a quarter of one, can then be parted."""
_TRIES = 10
"""Stretches of other documents that are looked at for one that is long enough."""
_FAR = 4
"""A cut moves back by at most this part of a row, to where a sentence ends."""


class Pair(NamedTuple):
    """A row."""

    tokens: Int32[np.ndarray, " S"]
    types: Int32[np.ndarray, " S"]
    label: int
    """0: as a document has them; 1: not."""


@dataclass(frozen=True)
class Pairing:
    """How documents become pairs: token ids."""

    kind: PairKind
    first: int
    """What begins rows."""
    separator: int
    """What stands behind each text."""
    ends: bytes
    """Which ids end a sentence, a bit for each."""
    begins: bytes
    """Which ids begin a word, a bit for each."""

    def said(self) -> list[object]:
        """What it does, as plain JSON."""
        return ["pairs", self.kind, self.first, self.separator]

    def text_of(self, document: Tokens) -> slice:
        """Where a document's text is, without what begins and ends it."""
        first = int(len(document) > 0 and document[0] == self.first)
        return slice(first, len(document) - int(len(document) > first and document[-1] == self.separator))

    def piece(self, read: Callable[[int, int], Tokens], size: int, number: int, room: int) -> Tokens:
        """One of the pieces of a text.

        Args:
          read: gives its tokens from one place to another one.
          size: its tokens.
          number: of the piece.
          room: tokens of a piece, at most.
        """
        count, far = pieces_of(size, room), room // _FAR
        begin, end = size * number // count, size * (number + 1) // count
        base = max(begin - far, 0) if number else 0
        tokens = read(base, end)
        places = np.flatnonzero(_has(self.ends, tokens)) + 1 + base
        start = _last(places, begin - far, begin) if number else 0
        stop = _last(places, end - far, end) if number + 1 < count else size
        if stop - start > room:
            stop = _last(places, start + room - far, start + room)
        return tokens[start - base : stop - base]

    def parted(self, piece: Tokens, draw: float) -> int:
        """Where the second text of a piece begins: where a sentence does, else where a word does, else anywhere."""
        inside = slice(LEAST, len(piece) - LEAST + 1)
        for there in (_has(self.ends, np.roll(piece, 1)), _has(self.begins, piece)):
            if len(places := np.flatnonzero(there[inside])):
                return LEAST + int(places[int(draw * len(places))])
        return LEAST + int(draw * (len(piece) - 2 * LEAST + 1))

    def tail(self, piece: Tokens, wanted: int, most: int) -> Tokens:
        """The end of a piece, from a sentence on, of about as many tokens as are wanted."""
        starts = np.r_[0, np.flatnonzero(_has(self.ends, piece[:-1])) + 1]
        sizes = len(piece) - starts
        if not len(able := sizes[(sizes >= LEAST) & (sizes <= most)]):
            return piece[-most:]
        return piece[-int(able[np.abs(able - wanted).argmin()]) :]

    def pair(self, piece: Tokens, room: int, draws: Iterator[float], other: Callable[[float], Tokens]) -> Pair:
        """A row of a piece.

        Args:
          room: tokens of both texts, at most.
          draws: random numbers from 0 to 1.
          other: gives a piece of another document, by such a number.
        """
        cut, label = self.parted(piece, next(draws)), int(next(draws) < 0.5)
        one, two = piece[:cut], piece[cut:]
        if label and self.kind == "order":
            one, two = two, one
        elif label:
            found = piece[:0]
            for _ in range(_TRIES):
                if len(tried := other(next(draws))) > len(found):
                    found = tried
                if len(found) >= len(two):
                    break
            two = self.tail(found, len(two), room - len(one))
        return self.framed(one, two, label)

    def framed(self, one: Tokens, two: Tokens, label: int) -> Pair:
        """A row of two texts."""
        behind = [self.separator]
        tokens = np.concatenate([[self.first], one, behind, two, behind]).astype(np.int32)
        types = np.zeros(len(tokens), np.int32)
        types[len(one) + 2 :] = 1
        return Pair(tokens, types, label)


def pieces_of(size: int, room: int) -> int:
    """How many pieces a text of so many tokens has; 0: it is too short to be parted."""
    return -(-size // room) if size >= 2 * LEAST else 0


def _has(bits: bytes, tokens: Tokens) -> np.ndarray:
    """[tokens] bool, which of them have their bit set."""
    table = np.frombuffer(bits, np.uint8)
    return (table[tokens >> 3] >> (7 - (tokens & 7)) & 1).astype(bool)


def _last(places: np.ndarray, first: int, last: int) -> int:
    """The last of some places, in order, behind ``first`` and up to ``last``; that itself if there is none."""
    at = int(places.searchsorted(last, "right")) - 1
    return int(places[at]) if at >= 0 and places[at] > first else last
