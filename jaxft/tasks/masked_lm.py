"""Masked language modelling (Devlin et al. 2018): some tokens of a text are hidden, and predicted from the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import TaskConfig
from jaxft.errors import UserError
from jaxft.tasks._tokens import TokenTask, refuse_label_options

Array = jax.Array
Batch = dict[str, Array]

LABELLED = False
END_TOKEN = False
_HIDDEN, _RANDOM = 0.8, 0.1  # of the predicted tokens; the rest stay as they are


@dataclass(frozen=True)
class Task(TokenTask):
    """Which tokens are hidden, and how their prediction is scored. Static and hashable: part of jit cache keys."""

    mask_id: int
    special_ids: tuple[int, ...]
    """Never hidden: start, end and padding tokens."""
    vocab_size: int
    rate: float = 0.15
    """Share of a text's tokens that are predicted, one at least."""

    head = "masked_lm"

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with tokens hidden anew: 80 % as the mask token, 10 % as a random one, 10 % left as they are.

        Which ones follows from ``key`` and the text of the row alone: not from its place in the batch, the padding, the
        devices or the number of micro-batches.

        Adds ``predict`` [B, M] int32 (their positions), ``targets`` [B, M] int32 (what stood there) and
        ``target_weights`` [B, M] float32; M is ``rate`` of the padded length.
        """
        tokens, (_, s) = batch["tokens"], batch["tokens"].shape
        most = max(1, round(self.rate * s))
        candidates = self._candidates(batch)
        # The sum is the same on any layout; padding counts nothing.
        place = jnp.arange(1, s + 1, dtype=jnp.uint32)
        text = (jnp.where(batch["mask"] != 0, tokens, 0).astype(jnp.uint32) * place).sum(-1)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(text)
        scores = jax.vmap(lambda k: jax.random.uniform(k, (s,)))(keys)
        _, predict = jax.lax.top_k(jnp.where(candidates, scores, -1.0), most)
        chosen = jnp.arange(most) < self._counts(candidates)[:, None]

        targets = jnp.take_along_axis(tokens, predict, axis=1)
        fate = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1), (most,)))(keys)
        other = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, 2), (most,), 0, self.vocab_size))(keys)
        shown = jnp.where(fate < _HIDDEN, self.mask_id, jnp.where(fate < _HIDDEN + _RANDOM, other, targets))
        # top_k gives each position once, so what is not chosen is put back where it was.
        shown = jnp.put_along_axis(tokens, predict, jnp.where(chosen, shown, targets), axis=1, inplace=False)
        weights = chosen * batch["weights"][:, None]
        return batch | {"tokens": shown, "predict": predict, "targets": targets, "target_weights": weights}

    def learnable(self, tokens: np.ndarray, offsets: np.ndarray) -> int:
        """How many tokens of ragged texts may be hidden: text i is ``tokens[offsets[i]:offsets[i + 1]]``."""
        del offsets
        return int((~np.isin(tokens, self.special_ids)).sum())

    def _candidates(self, batch: Batch) -> Array:
        special = jnp.isin(batch["tokens"], jnp.asarray(self.special_ids, jnp.int32))
        return (batch["mask"] != 0) & ~special

    def _counts(self, candidates: Array) -> Array:
        """[B] int32: how many tokens of each row are predicted."""
        there = candidates.sum(-1)
        wanted = jnp.maximum(1, jnp.round(self.rate * there).astype(jnp.int32))
        return jnp.where(there > 0, wanted, 0)


def make_task(config: TaskConfig, labels: Sequence[str], counts: Sequence[int], tokenizer: Any) -> Task:
    """The task of a run; there are no labels to count.

    Raises:
      UserError: the tokenizer has no mask token, or an option of labelled tasks is set.
    """
    del labels, counts
    refuse_label_options(config)
    if tokenizer.mask_id is None:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has no mask token, which masked_lm needs; set data.tokenizer"
        )
    return Task(tokenizer.mask_id, tokenizer.special_ids, tokenizer.vocab_size, config.mask_rate)
