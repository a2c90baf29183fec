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
    """The batch with ``targets`` [B, S] int32, the next token of each, and ``replied`` [B, S], 1 where that is of a reply of the same
    text."""
    there = batch.get("segments", (batch["mask"] != 0).astype(jnp.int32))
    following = jnp.pad(there[:, 1:], ((0, 0), (0, 1)))
    replied = jnp.pad(batch[REPLIES][:, 1:], ((0, 0), (0, 1))) * ((following == there) & (there != 0))
    return batch | {"targets": jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1))), "replied": replied}


def reply_logps(forward: Forward, batch: Batch, key: Array | None, texts: int) -> tuple[Array, Array]:
    """The summed log-probability of each text's reply, given all before, and of how many tokens it is: both [B, T] float32.

    Args:
      batch: as :func:`next_tokens` gives it.
      texts: T, of which ``segments`` tells the tokens (from 1).
    """
    output, targets = forward(batch, key), batch["targets"]
    if output.score is None:
        assert output.logits is not None  # models with this head have one of the two
        loss = token_cross_entropy(output.logits, targets)
    else:
        loss = output.score.loss
    replied = batch["replied"].astype(jnp.float32)
    segments = batch.get("segments", jnp.ones_like(targets))
    of_text = (segments[..., None] == jnp.arange(1, texts + 1)) * replied[..., None]
    return -(loss[..., None] * of_text).sum(1), of_text.sum(1)
