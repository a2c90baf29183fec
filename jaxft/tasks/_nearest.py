"""How well texts find what belongs to them among all texts of a data set, by cosine, exactly.

Dims: N examples, P texts of each, D width, Q different queries, C different candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_AT_ONCE = 1 << 24  # similarities held side by side


def cosines(vectors: np.ndarray) -> np.ndarray:
    """[N, P - 1] float64 between the first text of each example and its others."""
    vectors = vectors.astype(np.float64)
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return np.einsum("nd,npd->np", units[:, 0], units[:, 1:])


def taught_cosines(vectors: np.ndarray, texts: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """[N] float64, the mean cosine of each example's texts with its teacher's vector."""
    near, there = cosines(np.concatenate([teacher[:, None], vectors], axis=1)), texts >= 0
    return (near * there).sum(1) / np.maximum(there.sum(1), 1)


def margins(vectors: np.ndarray) -> np.ndarray:
    """[N] float64, how much larger the first text's dot product with the second is than with the third."""
    dots = np.einsum("nd,npd->np", vectors[:, 0], vectors[:, 1:], dtype=np.float64)
    return dots[:, 0] - dots[:, 1]


def nearest_scores(vectors: np.ndarray, texts: np.ndarray, at: int) -> dict[str, float]:
    """Means over queries, the different first texts; candidates are all different other texts; those of a query's examples that are
    partners are right. A candidate with the query's very words is passed over unless it is right. Equal cosines count against the model.

    ``hit@1``, ``mrr@k``, ``ndcg@k``, ``map`` and ``recall@k`` as :func:`~jaxft.tasks._retrieval.retrieval_scores` defines them; numbers
    of ``queries`` and ``candidates``.

    Args:
      vectors: [N, P, D].
      texts: [N, P]: equal texts have equal numbers; -1: there is none. The first and the second text of each example are there.
      at: k.
    """
    if not len(texts):
        return dict.fromkeys(names(at), math.nan) | {"queries": 0, "candidates": 0}
    among = _Search(vectors, texts)
    places = _places(among)
    return {**_means(among.pairs[:, 0], places, at), "queries": len(among.asked), "candidates": len(among.found)}


class Wrong(NamedTuple):
    """The wrong candidate that is nearest to the query, for each example."""

    place: np.ndarray
    """[N] from 1: of the example's partner among all candidates, other right ones left out."""
    example: np.ndarray
    """[N] an example that the wrong candidate is of; -1: there is none."""
    text: np.ndarray
    """[N] which of its texts it is."""
    cosine: np.ndarray
    """[N] float64."""


def nearest_wrong(vectors: np.ndarray, texts: np.ndarray) -> Wrong:
    """What stands in the way of each example's partner, among the candidates of :func:`nearest_scores`."""
    among = _Search(vectors, texts)
    best, cosine = np.full(len(among.asked), -1, np.int64), np.full(len(among.asked), -np.inf)
    before = np.empty(len(among.pairs), np.int64)
    for block in among.blocks():
        wrong = np.where(block.right, -np.inf, block.near)
        nearest = wrong.argmax(1)
        queries = np.arange(block.first, block.first + len(wrong))
        cosine[queries] = wrong[np.arange(len(wrong)), nearest]
        best[queries] = np.where(np.isneginf(cosine[queries]), -1, nearest)
        before[block.chosen] = block.wrong_before()
    pair = np.searchsorted(among.pairs[:, 0] * len(among.found) + among.pairs[:, 1], among.keys)
    of_query = among.pairs[pair, 0]
    example, text = np.divmod(among.flat[best[of_query]], texts.shape[1] - 1)
    missing = best[of_query] < 0
    return Wrong(before[pair] + 1, np.where(missing, -1, example), np.where(missing, 0, text + 1), cosine[of_query])


class _Block(NamedTuple):
    """Some queries beside all candidates."""

    first: int
    """The first query."""
    chosen: slice
    """Their pairs."""
    rows: np.ndarray
    columns: np.ndarray
    near: np.ndarray
    """[queries, C] float32, minus infinity for what is not to be found."""
    right: np.ndarray
    """[queries, C] bool."""

    def wrong_before(self) -> np.ndarray:
        """[pairs] wrong candidates at least as near."""
        mine = self.near[self.rows, self.columns]
        counts = (_count(self.near[row], self.right[row], score) for row, score in zip(self.rows, mine, strict=True))
        return np.fromiter(counts, np.int64, len(self.rows))


class _Search:
    """Different queries, different candidates, and who belongs to whom."""

    def __init__(self, vectors: np.ndarray, texts: np.ndarray) -> None:
        queries, of_query = np.unique(texts[:, 0], return_index=True)
        flat = texts[:, 1:].ravel()
        there = np.flatnonzero(flat >= 0)
        candidates, of_candidate = np.unique(flat[there], return_index=True)
        units = _unit(vectors)
        self.flat = there[of_candidate]
        """[C] the place of each candidate among all other texts of all examples."""
        self.asked, self.found = units[of_query, 0], units[:, 1:].reshape(len(flat), -1)[self.flat]
        each = np.stack([np.searchsorted(queries, texts[:, 0]), np.searchsorted(candidates, texts[:, 1])], 1)
        self.keys = each[:, 0] * len(candidates) + each[:, 1]
        """[N] of each example: its query and its partner as one number."""
        self.pairs = np.unique(each, axis=0)
        """[pairs, 2] a query and one that is right."""
        itself = np.searchsorted(candidates, queries)
        self._itself = np.where(candidates[np.minimum(itself, len(candidates) - 1)] == queries, itself, -1)

    def blocks(self) -> Iterator[_Block]:
        """The queries in blocks, each as large as there is room for."""
        step = max(1, _AT_ONCE // len(self.found))
        for first in range(0, len(self.asked), step):
            chosen = slice(*np.searchsorted(self.pairs[:, 0], [first, first + step]))
            rows, columns = self.pairs[chosen, 0] - first, self.pairs[chosen, 1]
            near = self.asked[first : first + step] @ self.found.T
            near = np.where(np.isnan(near), -np.inf, near)
            right = np.zeros_like(near, bool)
            right[rows, columns] = True
            own = self._itself[first : first + step]
            skipped = np.flatnonzero((own >= 0) & ~right[np.arange(len(own)), own])
            near[skipped, own[skipped]] = -np.inf
            yield _Block(first, chosen, rows, columns, near, right)


def names(at: int) -> tuple[str, ...]:
    """The scores, by name."""
    return f"mrr@{at}", f"ndcg@{at}", f"recall@{at}", "map", "hit@1"


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _places(among: _Search) -> np.ndarray:
    """[pairs] the place, from 1, of each right candidate among all; right ones of a query that are equally near stand one after the
    other."""
    places = np.empty(len(among.pairs), np.int64)
    for block in among.blocks():
        rows, mine = block.rows, block.near[block.rows, block.columns]
        order = np.lexsort((-mine, rows))
        rank = np.arange(len(rows)) - np.searchsorted(rows[order], rows[order]) + 1
        inside = np.empty(len(rows), np.int64)
        inside[order] = rank
        places[block.chosen] = block.wrong_before() + inside
    return places


def _count(near: np.ndarray, right: np.ndarray, score: float) -> int:
    """Wrong candidates at least as near."""
    return int(((near >= score) & ~right).sum())


def _means(queries: np.ndarray, places: np.ndarray, at: int) -> dict[str, float]:
    order = np.lexsort((places, queries))
    queries, places = queries[order], places[order].astype(np.float64)
    first = np.flatnonzero(np.append(True, np.diff(queries) != 0))
    size = np.diff(np.append(first, len(queries)))
    rank = np.arange(len(queries)) - first.repeat(size) + 1.0
    within = places <= at
    best = np.add.reduceat(np.where(rank <= at, 1 / np.log2(rank + 1), 0), first)
    each = {
        f"mrr@{at}": np.where(within, 1 / places, 0)[first],
        f"ndcg@{at}": np.add.reduceat(np.where(within, 1 / np.log2(places + 1), 0), first) / best,
        f"recall@{at}": np.add.reduceat(within.astype(np.float64), first) / size,
        "map": np.add.reduceat(rank / places, first) / size,
        "hit@1": (places[first] == 1).astype(np.float64),
    }
    return {name: float(values.mean()) for name, values in each.items()}
