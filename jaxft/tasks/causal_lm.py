"""Causal language modelling: each token is predicted from those before it in the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import TaskConfig
from jaxft.tasks._tokens import TokenTask, refuse_label_options

Array = jax.Array
Batch = dict[str, Array]

LABELLED = False
END_TOKEN = True


@dataclass(frozen=True)
class Task(TokenTask):
    """What is predicted. Static and hashable: part of jit cache keys."""

    head = "causal_lm"

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """Adds ``targets`` [B, S] int32, the next token of each, and ``target_weights`` [B, S] float32: 0 on the last token
        of each text, which has no next, and on padding."""
        del key
        tokens, mask = batch["tokens"], batch["mask"]
        there = batch.get("segments", (mask != 0).astype(jnp.int32))
        following = jnp.pad(there[:, 1:], ((0, 0), (0, 1)))
        weights = ((following == there) & (there != 0)) * batch["weights"][:, None]
        return batch | {"targets": jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))), "target_weights": weights}

    def learnable(self, tokens: np.ndarray, offsets: np.ndarray) -> int:
        """How many tokens of ragged texts have a token before them: text i is ``tokens[offsets[i]:offsets[i + 1]]``."""
        del tokens
        return int(np.maximum(np.diff(offsets) - 1, 0).sum())


def make_task(config: TaskConfig, labels: Sequence[str], counts: Sequence[int], tokenizer: Any) -> Task:
    """The task of a run; there are no labels to count.

    Raises:
      UserError: an option of labelled tasks is set.
    """
    del labels, counts, tokenizer
    refuse_label_options(config)
    return Task()
