"""What is said of each text of a batch, whether rows hold one each or several (:mod:`jaxft.data.packing`).

Dims: B rows, S tokens, E texts of a packed row.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxft.models.contract import Output
from jaxft.tasks.contract import Array, Batch


def by_text(values: Array) -> Array:
    """[B, ...] of rows of one text as they are; [B, E] of packed ones as [B E]."""
    return values.reshape(-1)


def logits_by_text(output: Output) -> Array:
    """[B, C] of rows of one text as they are; [B, E, C] of packed ones as [B E, C]."""
    logits = output.logits
    assert logits is not None  # models with heads of classes have logits
    return logits.reshape(-1, logits.shape[-1])


def at_tokens(values: Array, batch: Batch, side: str = "segments") -> Array:
    """What is said of each text, at its tokens: [B, 1] for [B] of rows of one text; for [B, E] of packed rows [B, S], 0 at padding.

    Args:
      side: the segments that say which tokens are of which text.
    """
    if values.ndim == 1:
        return values[:, None]
    segments = batch[side]
    spread = jnp.take_along_axis(values, jnp.maximum(segments - 1, 0), axis=1)
    return jnp.where(segments > 0, spread, 0)
