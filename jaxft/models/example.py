"""Batches that a model can be called with, whatever it reads: for its shapes, its proof of parity and its tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data.batch import HostBatch
from jaxft.models.contract import Facts


def smallest_shapes(facts: Facts) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of one row that a model can be initialised with."""
    field = facts.inputs[facts.reads]
    sizes = (axis if isinstance(axis, int) else 2 for axis in field.axes[1:])
    return {facts.reads: jax.ShapeDtypeStruct((1, *sizes), np.dtype(field.dtype))}


def smallest_batch(facts: Facts) -> dict[str, jax.Array]:
    """Such a batch, which costs nothing where it is traced: images may be large."""
    return {name: jnp.zeros(one.shape, one.dtype) for name, one in smallest_shapes(facts).items()}


def example_batch(facts: Facts, rows: int, seed: int = 0, length: int = 48) -> HostBatch:
    """Random inputs: tokens with types if the model takes them, and ragged padding (the first row is full, the last has one token);
    pixels or frames of sound; and targets so far, if the model has two sides."""
    rng = np.random.default_rng(seed)
    length = length if facts.limit is None else min(length, facts.limit)
    lengths = np.linspace(length, 1, rows).astype(int)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    vocabulary = facts.vocabulary or 1
    padding = facts.inputs["tokens"].fill if "tokens" in facts.inputs else 0

    def ids(seen: np.ndarray) -> np.ndarray:
        found = rng.integers(min(5, vocabulary - 1), vocabulary, seen.shape).astype(np.int32)
        return np.where(seen == 1, found, padding).astype(np.int32)

    if facts.processor == "text":
        batch = {"tokens": _ended(ids(mask), lengths, facts.end), "mask": mask}
    else:
        batch = {
            name: rng.normal(size=(rows, *one.shape[1:])).astype(one.dtype)
            for name, one in smallest_shapes(facts).items()
        }
    if "decoder_tokens" in facts.inputs:
        short = max(1, length // 2)
        decoder_mask = (np.arange(short) < np.maximum(lengths[:, None] // 2, 1)).astype(np.int32)
        batch |= {"decoder_tokens": ids(decoder_mask), "decoder_mask": decoder_mask}
    if "types" in facts.inputs:
        batch["types"] = (rng.integers(0, facts.inputs["types"].count or 1, (rows, length)) * mask).astype(np.int32)
    return batch


def _ended(tokens: np.ndarray, lengths: np.ndarray, end: int | None) -> np.ndarray:
    """Texts that end with the token ``end``, and have it nowhere else; None: as they are."""
    if end is None:
        return tokens
    others = np.where(tokens == end, 0 if end else 1, tokens)
    others[np.arange(len(tokens)), lengths - 1] = end
    return others
