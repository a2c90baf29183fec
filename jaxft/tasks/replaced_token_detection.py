"""Replaced-token detection, the pre-training of ELECTRA (Clark et al. 2020): a small generator fills in hidden tokens, and a discriminator
says of every token whether it is another one than the text had.

Both are trained at once. The generator learns as a masked language model; nothing is passed back through what it writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxft.config import RunConfig
from jaxft.config.tasks.replaced_token_detection import Config
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.models.contract import Facts
from jaxft.tasks import masked_lm
from jaxft.tasks._tokens import (
    LONG_TEXTS,
    PACKING,
    PROBLEM,
    ROW_OPTIONS,
    columns,
    encode_all,
    fields,
    study,
    token_cross_entropy,
)
from jaxft.tasks.contract import Array, Arrays, Batch, Direction, Forward, Sums, Targets

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
_SAMPLES, _DROPOUT = 4, 5  # streams of random numbers, apart from those that hide tokens


@dataclass(frozen=True)
class Hidden(masked_lm.Task):
    """What the generator sees: 85 % of the predicted tokens as the mask token, the rest as they are."""

    masked: ClassVar[float] = 0.85
    replaced: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Task:
    """Which tokens are hidden, and how what is written there is scored. Static and hashable: part of jit cache keys."""

    hidden: Hidden
    discriminator_weight: float = 50.0

    head = "replaced_token_detection"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        losses: dict[str, Direction] = {"loss": "min", "generator_loss": "min", "discriminator_loss": "min"}
        right: dict[str, Direction] = {"generator_accuracy": "max", "discriminator_accuracy": "max"}
        return {**losses, **right, "detection_precision": "max", "detection_recall": "max"}

    @property
    def schedule(self) -> str:
        """See :class:`~jaxft.tasks.contract.Scheduled`."""
        return self.hidden.schedule

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with tokens hidden (:meth:`jaxft.tasks.masked_lm.Task.prepare`).

        Adds ``sampling`` [B, 2] uint32, the key of what is drawn for each row, which follows from ``key`` and its text alone; ``seen``
        [B, S] float32, the weights of the discriminator's answers; and ``balance`` [B] float32, predicted tokens of the batch for each of
        these.
        """
        return self._with_weights(batch, self.hidden.prepare(batch, key), key)

    def prepare_at(self, batch: Batch, key: Array, step: ArrayLike) -> Batch:
        """The same for a training step: see :class:`~jaxft.tasks.contract.Scheduled`."""
        return self._with_weights(batch, self.hidden.prepare_at(batch, key, step), key)

    def _with_weights(self, before: Batch, batch: Batch, key: Array) -> Batch:
        sampling = jax.random.key_data(masked_lm.row_keys(before, jax.random.fold_in(key, _SAMPLES)))
        seen = (before["mask"] != 0) * before["weights"][:, None]
        # The step divides once, by the predicted tokens of the whole batch; the discriminator's loss is a mean over all tokens.
        balance = batch["target_weights"].sum() / jnp.maximum(seen.sum(), 1e-30)
        balances = jnp.broadcast_to(balance, before["weights"].shape)
        return batch | {"sampling": sampling, "seen": seen, "balance": balances}

    def weight(self, batch: Batch) -> Array:
        """The number of predicted tokens of a prepared batch: what the summed loss is divided by."""
        return batch["target_weights"].sum()

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss`` and ``weight`` of both networks together, and of each its loss and what it got right."""
        targets, weights = batch["targets"], batch["target_weights"]
        # Without targets the model gives logits, whatever model.vocab_tile: they are sampled from.
        text = {name: value for name, value in batch.items() if name not in ("predict", "targets")}
        of_generator = None if key is None else jax.random.fold_in(key, _DROPOUT)
        logits = forward(text | {"predict": batch["predict"]}, of_generator).logits
        assert logits is not None
        written = jnp.where(weights > 0, sampled(logits, batch["sampling"]), targets)
        generator = (token_cross_entropy(logits, targets) * weights).sum()

        def placed(row: Array, values: Array) -> Array:
            return jnp.put_along_axis(row, batch["predict"], values, axis=1, inplace=False)

        answers = forward(text | {"tokens": placed(batch["tokens"], written)}, key).logits
        assert answers is not None
        answer, seen = answers[..., 0].astype(jnp.float32), batch["seen"]
        other = placed(jnp.zeros(answer.shape, jnp.float32), (written != targets).astype(jnp.float32))
        loss = jax.nn.softplus(answer) - answer * other
        said = (answer > 0).astype(jnp.float32)
        discriminator = (loss * seen).sum(-1)
        return {
            "loss": generator + self.discriminator_weight * (discriminator * batch["balance"]).sum(),
            "weight": weights.sum(),
            "generator": generator,
            "correct": ((logits.argmax(-1) == targets) * weights).sum(),
            "discriminator": discriminator.sum(),
            "tokens": seen.sum(),
            "right": ((said == other) * seen).sum(),
            "replaced": (other * seen).sum(),
            "said": (said * seen).sum(),
            "found": (said * other * seen).sum(),
            "rows": batch["weights"].sum(),
        }

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """Nothing: the sums suffice."""
        del forward, batch
        return {}

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, float]:
        """Mean losses in nats, and the shares that are right; ``detection_recall`` is of replaced tokens, ``detection_precision`` of
        what is said to be replaced. NaN where there is nothing to be right about."""
        del outputs

        def share(part: str, whole: str) -> float:
            return float(sums[part]) / (float(sums[whole]) or math.nan)

        generator, discriminator = share("generator", "weight"), share("discriminator", "tokens")
        return {
            "loss": generator + self.discriminator_weight * discriminator,
            "generator_loss": generator,
            "discriminator_loss": discriminator,
            "generator_accuracy": share("correct", "weight"),
            "discriminator_accuracy": share("right", "tokens"),
            "detection_precision": share("found", "said"),
            "detection_recall": share("found", "replaced"),
            "rows": int(np.rint(sums["rows"])),
            "predicted_tokens": int(np.rint(sums["weight"])),
            "replaced_tokens": int(np.rint(sums["replaced"])),
        }

    def learnable(self, split: Split) -> int:
        """How many tokens may be hidden."""
        return self.hidden.learnable(split)


def sampled(logits: Array, sampling: Array) -> Array:
    """[B, M] int32, a token drawn from each of the logits [B, M, V], which get no gradient from it.

    Args:
      sampling: [B, 2] uint32, the key of each row.
    """
    logits, shape = jax.lax.stop_gradient(logits.astype(jnp.float32)), logits.shape[1:]

    def noise(key: Array) -> Array:
        return jax.random.gumbel(jax.random.wrap_key_data(key), shape, jnp.float32)

    return (logits + jax.vmap(noise)(sampling)).argmax(-1).astype(jnp.int32)


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
    return Task(
        Hidden(*masked_lm.masking_of(options, tokenizer, "replaced_token_detection")), options.discriminator_weight
    )
