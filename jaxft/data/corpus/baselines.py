"""What counts alone know of held-out documents: a unigram, and a trigram with modified Kneser-Ney smoothing (Chen & Goodman 1999), learnt
of the tokens of a training corpus. Neither gives any token of the vocabulary a probability of zero.

Memory goes with the tokens that are counted: up to 40 bytes for each, about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxft.data.corpus.store import Corpus
from jaxft.errors import UserError

MOST_TOKENS = 50_000_000
"""Tokens of the training corpus that are counted, the first ones."""
MOST_VOCABULARY = (1 << 21) - 2
"""Three tokens fit 63 bits."""
_TOGETHER = 1 << 20  # held-out tokens that are looked up together


@dataclass(frozen=True)
class Counted:
    """How often pairs (context, token) were counted, sorted, and what follows from it for each context."""

    keys: np.ndarray
    """[pairs] int64, contexts times ``width`` plus tokens, in order."""
    counts: np.ndarray
    width: int
    contexts: np.ndarray
    """[contexts] int64, in order."""
    totals: np.ndarray
    """[contexts] how often each was counted."""
    kept_back: np.ndarray
    """[contexts] how much of its total is given to what is less specific."""
    discounts: np.ndarray
    """[4] what is taken off counts of 0, 1, 2, 3 or more."""

    def probabilities(self, contexts: np.ndarray, tokens: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of tokens after contexts; ``lower`` are those that less specific contexts give."""
        place, known = _found(self.contexts, contexts)
        at, there = _found(self.keys, contexts * self.width + tokens)
        counts = np.where(there, self.counts[at], 0)
        total = np.where(known, self.totals[place], 1)
        own = (counts - self.discounts[np.minimum(counts, 3)]) / total
        return np.where(known, own + self.kept_back[place] / total * lower, lower)


def _found(sorted_keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return place, sorted_keys[place] == wanted


def _counted(keys: np.ndarray, counts: np.ndarray, width: int) -> Counted:
    discounts = _discounts(np.bincount(np.minimum(counts, 5), minlength=6))
    contexts = keys // width
    first = np.flatnonzero(np.diff(contexts, prepend=-1))
    return Counted(
        keys,
        counts,
        width,
        contexts[first],
        np.add.reduceat(counts, first),
        np.add.reduceat(discounts[np.minimum(counts, 3)], first),
        discounts,
    )


def _discounts(of: np.ndarray) -> np.ndarray:
    """What is taken off each count, from how many things were counted once to four times; a half where none was counted so often."""
    if not of[1:5].all():
        return np.array([0.0, 0.5, 0.5, 0.5])
    share = of[1] / (of[1] + 2 * of[2])
    found = [n - (n + 1) * share * of[n + 1] / of[n] for n in (1, 2, 3)]
    return np.array([0.0, *(min(max(one, 0.05), n - 0.05) for n, one in enumerate(found, 1))])


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys, each once, and how often each was there; the argument is sorted in place."""
    keys.sort()
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.diff(first, append=len(keys))


@dataclass(frozen=True)
class Trigram:
    """A token's probability from the two before it, and from none, of one corpus."""

    width: int
    """Tokens, and one that stands for what is before a document."""
    singles: np.ndarray
    """[vocabulary] probabilities of tokens as often as they are."""
    continuing: np.ndarray
    """[vocabulary] probabilities of tokens by how many different ones they follow."""
    pairs: Counted
    triples: Counted

    def logs(self, first: np.ndarray, second: np.ndarray, third: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Natural logarithms of what the unigram and the trigram give tokens."""
        lower = self.pairs.probabilities(second, third, self.continuing[third])
        found = self.triples.probabilities(first * self.width + second, third, lower)
        return np.log(self.singles[third]), np.log(found)


def learn(corpus: Corpus, vocabulary: int, before: tuple[int, ...]) -> tuple[Trigram, int]:
    """A trigram of a corpus, and of how many tokens.

    Args:
      vocabulary: tokens that there are.
      before: tokens that documents may begin with that are no text.

    Raises:
      UserError: there is nothing to count.
    """
    width = vocabulary + 1
    parts, held = list[np.ndarray](), 0
    for first, second, third in _triples(corpus, vocabulary, before):
        parts.append((first * width + second) * width + third)
        held += len(third)
        if held >= MOST_TOKENS:
            parts[-1] = parts[-1][: len(third) - (held - MOST_TOKENS)]
            break
    if not held:
        raise UserError(f"{corpus.name}: no document has a token that can be predicted: there is nothing to count")
    keys = np.concatenate(parts)
    del parts
    count = len(keys)
    singles = _smoothed(np.bincount(keys % width, minlength=vocabulary)[:vocabulary])
    types, counts = _unique(keys)
    triples = _counted(types, counts, width)
    pairs = _counted(*_unique(types % (width * width)), width)
    continuing = _smoothed(np.bincount(pairs.keys % width, minlength=vocabulary)[:vocabulary])
    return Trigram(width, singles, continuing, pairs, triples), count


def _smoothed(counts: np.ndarray) -> np.ndarray:
    """Probabilities, with what is taken off counts given to all alike."""
    taken = _discounts(np.bincount(np.minimum(counts, 5), minlength=6))[np.minimum(counts, 3)]
    return (counts - taken + taken.sum() / len(counts)) / counts.sum()


def _triples(
    corpus: Corpus, boundary: int, before: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(the one but last, the last, the token) of every token that is scored, some documents at a time.

    Args:
      boundary: what stands for that which is before a document.
    """
    for tokens, offsets in corpus.shards:
        start = 0
        while start < len(offsets) - 1:
            stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + _TOGETHER, "right")) - 1)
            yield _of_documents(
                tokens[offsets[start] : offsets[stop]].astype(np.int64),
                offsets[start : stop + 1] - offsets[start],
                boundary,
                before,
            )
            start = stop


def _of_documents(
    tokens: np.ndarray, offsets: np.ndarray, boundary: int, before: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sizes = np.diff(offsets)
    begin = np.repeat(offsets[:-1], sizes)
    heads = offsets[:-1][sizes > 0]
    # A document that begins with such a token has its text one place later.
    skipped = np.isin(tokens[heads], before).astype(np.int64)
    text = begin + np.repeat(skipped, sizes[sizes > 0])
    places = np.arange(len(tokens))
    last, other = (np.where(places - text >= back, tokens[np.maximum(places - back, 0)], boundary) for back in (1, 2))
    # Without a token that comes before documents, their first one is never predicted.
    scored = places >= text if before else places > text
    return other[scored], last[scored], tokens[scored]


@dataclass(frozen=True)
class Bits:
    """What held-out documents take."""

    tokens: int
    unigram: float
    trigram: float


def held_out_bits(model: Trigram, corpus: Corpus, before: tuple[int, ...]) -> Bits:
    """The bits that unigram and trigram take for the tokens of a corpus."""
    count, found = 0, np.zeros(2)
    for triples in _triples(corpus, model.width - 1, before):
        logs = model.logs(*triples)
        count += len(logs[0])
        found -= [one.sum() / math.log(2) for one in logs]
    return Bits(count, *found.tolist())
