"""How probable replies are: what preferences are learnt of, and what ``jaxft score`` says.

Dims: B rows, S tokens, T texts of a row.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxft.tasks._tokens import token_cross_entropy
from jaxft.tasks.contract import Array, Batch, Forward

REPLIES = "replies"
"""The field that says of each token whether it is of a reply."""


def next_tokens(batch: Batch) -> Batch:
    """The batch with ``targets`` [B, S] int32, the next token of each."""
    return batch | {"targets": jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))}


def _next_of_replies(batch: Batch, texts: int) -> Array:
    """[B, S, T] float32, 1 where the next token is of the reply of a text, and of that text itself."""
    there = batch.get("segments", (batch["mask"] != 0).astype(jnp.int32))
    following, replied = (jnp.pad(values[:, 1:], ((0, 0), (0, 1))) for values in (there, batch[REPLIES]))
    replied = replied * (following == there)
    return ((there[..., None] == jnp.arange(1, texts + 1)) * replied[..., None]).astype(jnp.float32)


def reply_tokens(batch: Batch, texts: int) -> Array:
    """[B, T] float32, how many tokens of each text's reply are predicted."""
    return _next_of_replies(batch, texts).sum(1)


def reply_logps(forward: Forward, batch: Batch, key: Array | None, texts: int) -> Array:
    """[B, T] float32, the summed log-probability of each text's reply, given all before.

    Args:
      batch: with ``targets``, as :func:`next_tokens` gives it.
      texts: T, of which ``segments`` tells the tokens (from 1).
    """
    output, targets = forward(batch, key), batch["targets"]
    if output.score is None:
        assert output.logits is not None  # models with this head have one of the two
        loss = token_cross_entropy(output.logits, targets)
    else:
        loss = output.score.loss
    return -(loss[..., None] * _next_of_replies(batch, texts)).sum(1)
