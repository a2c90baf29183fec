"""Masked language modelling (Devlin et al. 2018): some tokens of a text are hidden, and predicted from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.masked_lm import Config
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._tokens import LONG_TEXTS, PACKING, PROBLEM, ROW_OPTIONS, TokenTask, columns, encode_all, fields, study
from jaxft.tasks.contract import Array, Batch, Targets

__all__ = [
    "LONG_TEXTS",
    "PACKING",
    "PROBLEM",
    "ROW_OPTIONS",
    "Config",
    "Task",
    "columns",
    "encode",
    "fields",
    "make_task",
    "study",
]
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

    def learnable(self, split: Split) -> int:
        """How many tokens may be hidden."""
        return int((~np.isin(split.columns["tokens"], self.special_ids)).sum())

    def _candidates(self, batch: Batch) -> Array:
        special = jnp.isin(batch["tokens"], jnp.asarray(self.special_ids, jnp.int32))
        return (batch["mask"] != 0) & ~special

    def _counts(self, candidates: Array) -> Array:
        """[B] int32: how many tokens of each row are predicted."""
        there = candidates.sum(-1)
        wanted = jnp.maximum(1, jnp.round(self.rate * there).astype(jnp.int32))
        return jnp.where(there > 0, wanted, 0)


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each text."""
    del targets
    return encode_all(rows, tokenizer, config)


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: the tokenizer has no mask token.
    """
    del targets, facts
    if tokenizer.special.mask is None:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has no mask token, which masked_lm needs; set data.tokenizer"
        )
    return Task(tokenizer.special.mask, tokenizer.special_ids, tokenizer.vocab_size, options.mask_rate)
