"""How well texts find what belongs to them among all texts of a data set, by cosine, exactly.

Dims: N examples, P texts of each, D width, Q different queries, C different candidates.
"""

from __future__ import annotations

import math

import numpy as np

_AT_ONCE = 1 << 24  # similarities held side by side


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
    queries, of_query = np.unique(texts[:, 0], return_index=True)
    flat = texts[:, 1:].ravel()
    there = np.flatnonzero(flat >= 0)
    candidates, of_candidate = np.unique(flat[there], return_index=True)
    units = _unit(vectors)
    asked, found = units[of_query, 0], units[:, 1:].reshape(len(flat), -1)[there[of_candidate]]
    pairs = np.unique(
        np.stack([np.searchsorted(queries, texts[:, 0]), np.searchsorted(candidates, texts[:, 1])], 1), axis=0
    )
    itself = np.searchsorted(candidates, queries)
    itself = np.where(candidates[np.minimum(itself, len(candidates) - 1)] == queries, itself, -1)
    places = _places(asked, found, pairs, itself)
    return {**_means(pairs[:, 0], places, at), "queries": len(queries), "candidates": len(candidates)}


def names(at: int) -> tuple[str, ...]:
    """The scores, by name."""
    return f"mrr@{at}", f"ndcg@{at}", f"recall@{at}", "map", "hit@1"


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _places(asked: np.ndarray, found: np.ndarray, pairs: np.ndarray, itself: np.ndarray) -> np.ndarray:
    """[pairs] the place, from 1, of each right candidate among all; right ones of a query that are equally near stand one after the
    other."""
    places = np.empty(len(pairs), np.int64)
    step = max(1, _AT_ONCE // len(found))
    for first in range(0, len(asked), step):
        chosen = slice(*np.searchsorted(pairs[:, 0], [first, first + step]))
        rows, columns = pairs[chosen, 0] - first, pairs[chosen, 1]
        near = asked[first : first + step] @ found.T
        near = np.where(np.isnan(near), -np.inf, near)
        right = np.zeros_like(near, bool)
        right[rows, columns] = True
        own = itself[first : first + step]
        skipped = np.flatnonzero((own >= 0) & ~right[np.arange(len(own)), own])
        near[skipped, own[skipped]] = -np.inf
        mine = near[rows, columns]
        wrong_before = np.array([_count(near[row], right[row], score) for row, score in zip(rows, mine, strict=True)])
        order = np.lexsort((-mine, rows))
        rank = np.arange(len(rows)) - np.searchsorted(rows[order], rows[order]) + 1
        inside = np.empty(len(rows), np.int64)
        inside[order] = rank
        places[chosen] = wrong_before + inside
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
