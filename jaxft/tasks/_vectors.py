"""One vector for each text of a row, from the vectors of its tokens.

Dims: B rows, S tokens, E texts of a row, D width.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxft.models.heads import first_of_texts, last_of_texts, mean_of_texts
from jaxft.tasks.contract import Array, Batch

POOLINGS = ("mean", "cls", "last", "weighted")


def text_vectors(how: str, hidden: Array, batch: Batch) -> Array:
    """[B, E, D] float32, as the modules of sentence-transformers of the same meaning give.

    Args:
      how: ``mean`` of a text's tokens, its first (``cls``) or ``last`` one, or the mean ``weighted`` by place: 1, 2, ... (SGPT,
        Muennighoff 2022).
      hidden: [B, S, D].
      batch: its ``segments`` and ``positions`` say which tokens are of which text, its ``starts`` [B, ...] where each text begins.
    """
    starts, segments = batch["starts"].reshape(len(hidden), -1), batch["segments"]
    hidden = hidden.astype(jnp.float32)
    if how == "cls":
        return first_of_texts(hidden, starts)
    if how == "mean":
        return mean_of_texts(hidden, None, segments, starts)
    if how == "last":
        return last_of_texts(hidden, None, segments, starts)
    numbers = jnp.arange(1, starts.shape[1] + 1)
    chosen = segments[:, None] == numbers[:, None]
    weights = jnp.where(chosen, batch["positions"][:, None] + 1, 0).astype(jnp.float32)
    sums = jnp.einsum("bes,bsd->bed", weights, hidden, precision="highest")
    return sums / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
