"""What language-modelling tasks share: a loss per predicted token, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import TaskConfig
from jaxft.errors import UserError

Array = jax.Array
Direction = Literal["max", "min"]
Batch = dict[str, Array]
Sums = dict[str, Array]


class TokenTask:
    """Tasks that read an output's ``logits``, or its ``score`` where the model made that instead.

    Their prepared batches have ``targets`` int32 and ``target_weights`` float32, of the shape of the logits but V.
    """

    labels: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        return {"loss": "min", "perplexity": "min", "accuracy": "max"}

    def weight_of(self, batch: Batch) -> Array:
        """The number of predicted tokens of a prepared batch: what the summed loss is divided by."""
        return batch["target_weights"].sum()

    def sums(self, output: Any, batch: Batch) -> Sums:
        """``loss``, ``weight`` and ``correct`` summed over the predicted tokens of a prepared batch, and its ``rows``."""
        targets, weights = batch["targets"], batch["target_weights"]
        if output.score is None:
            loss, best = token_cross_entropy(output.logits, targets), output.logits.argmax(-1)
        else:
            loss, best = output.score
        return {
            "loss": (loss * weights).sum(),
            "weight": weights.sum(),
            "correct": ((best == targets) * weights).sum(),
            "rows": batch["weights"].sum(),
        }

    def outputs(self, output: Any, batch: Batch) -> Batch:
        """Nothing: the sums suffice."""
        del output, batch
        return {}

    def score(self, sums: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Mean loss in nats, its exponential, and the share of tokens guessed right; NaN if no token was predicted."""
        del outputs
        tokens = float(sums["weight"]) or math.nan
        loss = float(sums["loss"]) / tokens
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


def refuse_label_options(config: TaskConfig) -> None:
    """Raises UserError if an option of labelled tasks is set."""
    if config.label_smoothing or config.class_weights != "none":
        raise UserError(
            f"task.label_smoothing and task.class_weights are for labelled tasks; leave them out for {config.name}"
        )
