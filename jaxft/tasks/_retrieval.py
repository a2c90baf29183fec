"""How well scores put the passages of each query in order, exactly, over all queries.

Dims: N passages of all queries, Q queries.
"""

from __future__ import annotations

import math

import numpy as np


def retrieval_scores(queries: np.ndarray, scores: np.ndarray, gains: np.ndarray, at: int) -> dict[str, float]:
    """Means over queries that have a relevant passage.

    ``hit@1``: the first passage is relevant. ``mrr@k``: 1 / the place of the first relevant one, 0 beyond k. ``ndcg@k``: discounted gains
    (Järvelin and Kekäläinen 2002; linear gains, 1 / log2(place + 1)) by those of the best order. ``map``: average precision over all
    places. ``recall@k``: the share of relevant passages among the first k. Of passages with equal scores, less relevant ones are taken
    to stand first: a model that tells nothing apart earns nothing. ``queries`` that were scored, and those ``without_relevant``.

    Args:
      queries: [N] int, whose passage each is.
      scores: [N], NaN: the model says nothing, and the passage stands last.
      gains: [N], above 0: relevant.
      at: k.
    """
    order = np.lexsort((gains, np.where(np.isnan(scores), np.inf, -scores), queries))
    first, size = _groups(queries[order])
    places = np.arange(len(queries)) - first.repeat(size) + 1.0
    gained = gains[order].astype(np.float64)
    relevant, within = gained > 0, places <= at
    discount = within / np.log2(places + 1)
    best = gains[np.lexsort((-gains, queries))]  # the same places, in the best order
    hits = _sums(relevant, first)
    there = hits > 0
    so_far = np.cumsum(relevant) - (np.cumsum(relevant)[first] - relevant[first]).repeat(size)
    each = {
        "hit@1": _sums(relevant & (places == 1), first),
        f"mrr@{at}": _most(relevant * within / places, first),
        f"ndcg@{at}": _sums(gained * discount, first) / np.where(there, _sums(best * discount, first), 1),
        "map": _sums(relevant * so_far / places, first) / np.maximum(hits, 1),
        f"recall@{at}": _sums(relevant & within, first) / np.maximum(hits, 1),
    }
    found = {name: float(values[there].mean()) if there.any() else math.nan for name, values in each.items()}
    return {**found, "queries": int(there.sum()), "without_relevant": int((~there).sum())}


def _groups(sorted_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[Q] where each group of equal ids begins, and its size."""
    first = (
        np.flatnonzero(np.append(True, sorted_ids[1:] != sorted_ids[:-1])) if len(sorted_ids) else np.zeros(0, np.int64)
    )
    return first, np.diff(np.append(first, len(sorted_ids)))


def _sums(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values.astype(np.float64), first) if len(first) else np.zeros(0)


def _most(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.maximum.reduceat(values, first) if len(first) else np.zeros(0)
