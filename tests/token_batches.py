"""Batches of random tokens between the marks of a text, as masked-LM tasks read them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

VOCAB = 96


def batch_of(lengths: list[int], width: int, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
    tokens = np.where(mask, rng.integers(5, VOCAB, mask.shape), 0)
    tokens[:, 0] = 2
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = 3
    weights = np.ones(len(lengths), np.float32)
    made = {"tokens": tokens, "mask": mask, "types": 0 * mask, "weights": weights, "labels": np.zeros(len(lengths))}
    return {name: jnp.asarray(value, jnp.float32 if name == "weights" else jnp.int32) for name, value in made.items()}
