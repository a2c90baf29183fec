"""What language-modelling tasks share: a loss per predicted token, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.data.batch import Fields, text_fields
from jaxft.data.encode import Column, chunks_of, encode_texts, text_columns
from jaxft.data.examples import Encoded
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.tasks.contract import Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate", "split")
PACKING = True
ROW_OPTIONS: tuple[str, ...] = ()
PROBLEM: str | None = None


class TokenTask:
    """Tasks that read an output's ``logits``, or its ``score`` where the model made that instead.

    Their prepared batches have ``targets`` int32 and ``target_weights`` float32, of the shape of the logits but V. A task may have a
    ``z_loss``: what is added to a token's loss for each square of the log of the sum of its exponentiated logits (Chowdhery et al. 2022),
    which keeps that near 0; it is no part of the loss that is told.
    """

    @property
    def z_loss(self) -> float:
        """See above; 0: none."""
        return 0.0

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        return {"loss": "min", "perplexity": "min", "accuracy": "max"}

    def weight(self, batch: Batch) -> Array:
        """The number of predicted tokens of a prepared batch: what the summed loss is divided by."""
        return batch["target_weights"].sum()

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss``, ``weight`` and ``correct`` summed over the predicted tokens of a prepared batch, and its ``rows``."""
        output = forward(batch, key)
        targets, weights = batch["targets"], batch["target_weights"]
        if output.score is None:
            assert output.logits is not None  # models with this head have one of the two
            loss, best = token_cross_entropy(output.logits, targets), output.logits.argmax(-1)
            normaliser = jax.nn.logsumexp(output.logits.astype(jnp.float32), axis=-1) if self.z_loss else None
        else:
            loss, best, normaliser = output.score
        penalty = {}
        if self.z_loss and normaliser is not None:
            squares = self.z_loss * jnp.square(normaliser)
            loss, penalty = loss + squares, {"penalty": (squares * weights).sum()}
        return {
            **penalty,
            "loss": (loss * weights).sum(),
            "weight": weights.sum(),
            "correct": ((best == targets) * weights).sum(),
            "rows": batch["weights"].sum(),
        }

    def passage_scores(self, forward: Forward, batch: Batch) -> Batch:
        """Sums of each row: see :class:`~jaxft.tasks.contract.Exhaustive`."""
        output, weights = forward(batch, None), batch["scored"]
        if output.score is None:
            assert output.logits is not None
            loss, best = token_cross_entropy(output.logits, batch["targets"]), output.logits.argmax(-1)
        else:
            loss, best, _ = output.score
        there = weights > 0  # what is not scored may be anything, NaN too
        return {
            "loss": jnp.where(there, loss, 0.0).sum(-1),
            "correct": (there & (best == batch["targets"])).sum(-1).astype(jnp.float32),
        }

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """Nothing: the sums suffice."""
        del forward, batch
        return {}

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, float]:
        """Mean loss in nats, its exponential, and the share of tokens guessed right; NaN if no token was predicted."""
        del outputs
        tokens = float(sums["weight"]) or math.nan
        loss = (float(sums["loss"]) - float(sums.get("penalty", 0.0))) / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": float(sums["correct"]) / tokens,
            "rows": int(np.rint(sums["rows"])),
            "predicted_tokens": int(np.rint(sums["weight"])),
        }


def token_cross_entropy(logits: Array, targets: Array) -> Array:
    """-log softmax(logits)[target] in float32: logits [..., V], targets [...] int32 -> [...]."""
    logits = logits.astype(jnp.float32)
    # Compare and add instead of a gather: it splits over a sharded vocabulary, and its backward pass is no scatter.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0.0).sum(-1)


def columns(config: RunConfig) -> tuple[Column, ...]:
    """A text, and its pair if there is one."""
    return text_columns(config.data)


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """Nothing: texts are their own targets."""
    del rows, config, stored, note
    return Targets()


def encode_all(
    rows: Iterable[Row], tokenizer: TextProcessor, config: RunConfig, end_id: int | None = None
) -> Iterator[Encoded]:
    """Each text as an example, or as several where ``data.long_texts=split``."""
    split = config.data.long_texts == "split"
    for first, chunk in chunks_of(rows):
        paired = len(chunk[0].values) == 2
        for one in encode_texts(chunk, tokenizer, paired=paired, split=split, end_id=end_id):
            yield one._replace(row=first + one.row)


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of texts."""
    del config
    return text_fields(pad_id)
