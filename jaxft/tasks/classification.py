"""Single-label classification of a text or a text pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import TaskConfig
from jaxft.errors import UserError, nearest
from jaxft.tasks._ranking import auroc, average_precision, best_cut

Array = jax.Array
Direction = Literal["max", "min"]
Batch = dict[str, Array]
Sums = dict[str, Array]

LABELLED = True
END_TOKEN = False

MOST_CONFUSION_CLASSES = 200
"""Beyond this many classes no confusion matrix is counted: of 3,000 it would take 36 MB for each batch."""


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    labels: tuple[str, ...]
    """Label names in the order of class ids."""
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """One weight per class, or None for 1 each."""
    threshold: float | None = None
    """Of two classes: the second is predicted where its probability is at least this. None: the more probable one."""

    head = "classification"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        ranking: dict[str, Direction] = {"auroc": "max", "average_precision": "max"} if self._binary else {}
        return {"accuracy": "max", "macro_f1": "max", "micro_f1": "max", "loss": "min", **ranking}

    @property
    def _binary(self) -> bool:
        return len(self.labels) == 2

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight_of(self, batch: Batch) -> Array:
        """The total weight of a batch: what the summed loss is divided by."""
        return _row_weights(batch, self.class_weights).sum()

    def sums(self, output: Any, batch: Batch) -> Sums:
        """``loss``, ``weight`` (scalars), ``true``, ``predicted`` and ``correct`` [C] rows per class summed over a batch.

        Up to ``MOST_CONFUSION_CLASSES`` classes also ``confusion`` [C true, C predicted]. Rows of weight 0 (padding of the last
        batch) add nothing.
        """
        logits, labels = output.logits, batch["labels"]
        loss = cross_entropy(logits, labels, self.label_smoothing, self.class_weights)
        count = batch["weights"]
        true, predicted = (jax.nn.one_hot(ids, len(self.labels)) for ids in (labels, self._predicted(logits)))
        counted = true * count[:, None]
        sums = {
            "loss": (loss * count).sum(),
            "weight": self.weight_of(batch),
            "true": counted.sum(0),
            "predicted": (predicted * count[:, None]).sum(0),
            "correct": (predicted * counted).sum(0),
        }
        if len(self.labels) <= MOST_CONFUSION_CLASSES:
            sums["confusion"] = jnp.einsum("bt,bp->tp", counted, predicted, precision="highest")
        return sums

    def outputs(self, output: Any, batch: Batch) -> Batch:
        """What the model says of each row: ``predicted`` [B] int32 and its ``probability`` [B] float32.

        Of two classes also ``positive``, the probability of the second, and ``margin``, by how much its logit is higher [B]: unlike
        the probability, it does not round to 1.
        """
        logits = output.logits.astype(jnp.float32)
        probabilities, predicted = jax.nn.softmax(logits, axis=-1), self._predicted(logits)
        chosen = jax.nn.one_hot(predicted, len(self.labels))
        found = {"predicted": predicted, "probability": jnp.where(chosen > 0, probabilities, 0.0).sum(-1)}
        if self._binary:
            found |= {"positive": probabilities[:, 1], "margin": logits[:, 1] - logits[:, 0]}
        return found | {"labels": batch["labels"], "weights": batch["weights"]}

    def _predicted(self, logits: Array) -> Array:
        if self.threshold is None:
            return logits.argmax(-1)
        return (jax.nn.softmax(logits.astype(jnp.float32), axis=-1)[:, 1] >= self.threshold).astype(jnp.int32)

    def learnable(self, tokens: np.ndarray, offsets: np.ndarray) -> int:
        """The number of rows."""
        del tokens
        return len(offsets) - 1

    def score(self, sums: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Accuracy, macro and micro F1, per-class precision/recall/F1, and the confusion matrix if it was counted.

        A class that is never predicted has precision 0; one without true rows has recall 0; macro F1 averages the classes
        that have true or predicted rows (scikit-learn's default does the same). Scores of no rows are NaN.

        Args:
          sums: of all batches.
          outputs: of all rows; needed for the scores of two classes: area under the ROC curve, average precision and the
            threshold of the best F1 of the second class.
        """
        hits, true, predicted = (np.rint(sums[name]).astype(np.int64) for name in ("correct", "true", "predicted"))
        rows = int(true.sum())
        precision = hits / np.maximum(predicted, 1)
        recall = hits / np.maximum(true, 1)
        f1 = 2 * hits / np.maximum(true + predicted, 1)
        seen = (true + predicted) > 0
        scores = {
            "loss": float(sums["loss"]) / (float(sums["weight"]) or math.nan),
            "accuracy": float(hits.sum()) / (rows or math.nan),
            "macro_f1": float(f1[seen].mean()) if seen.any() else math.nan,
            # With exactly one label per row, micro precision = micro recall = micro F1 = accuracy.
            "micro_f1": 2 * float(hits.sum()) / (float(true.sum() + predicted.sum()) or math.nan),
            **(self._ranking(outputs) if self._binary and outputs is not None else {}),
            "rows": rows,
            "classes": {
                label: {
                    "precision": float(precision[i]),
                    "recall": float(recall[i]),
                    "f1": float(f1[i]),
                    "rows": int(true[i]),
                }
                for i, label in enumerate(self.labels)
            },
        }
        if "confusion" in sums:
            scores["confusion"] = np.rint(sums["confusion"]).astype(np.int64).tolist()
        return scores

    def _ranking(self, outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        positive = outputs["labels"] == 1
        cut = best_cut(outputs["positive"], positive)
        return {
            "auroc": auroc(outputs["margin"], positive),
            "average_precision": average_precision(outputs["margin"], positive),
            "positive": self.labels[1],
            "best_threshold": None if cut is None else {"threshold": cut.threshold, "f1": cut.f1},
        }


def cross_entropy(
    logits: Array, labels: Array, smoothing: float = 0.0, weights: tuple[float, ...] | None = None
) -> Array:
    """Per-row loss [B] of float logits [B, C] and int labels [B]; as torch's ``cross_entropy`` with ``label_smoothing`` and
    ``weight``, before its division by the summed weights of the true classes."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    scale = jnp.ones(logits.shape[-1], jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    # one_hot rather than a gather: the backward pass of a gather is a scatter.
    chosen = jax.nn.one_hot(labels, logits.shape[-1])
    target = (1.0 - smoothing) * chosen + smoothing / logits.shape[-1]
    return -(target * scale * logp).sum(-1)


def _row_weights(batch: Batch, class_weights: tuple[float, ...] | None) -> Array:
    if class_weights is None:
        return batch["weights"]
    return batch["weights"] * jnp.asarray(class_weights, jnp.float32)[batch["labels"]]


def make_task(config: TaskConfig, labels: tuple[str, ...], counts: tuple[int, ...], tokenizer: Any) -> Task:
    """The task of a run.

    Args:
      config: the ``task`` section.
      labels: label names in the order of class ids.
      counts: training rows per label, for balanced class weights.
      tokenizer: not needed.

    Raises:
      UserError: fewer than two labels, or class weights that do not name exactly the labels.
    """
    del tokenizer
    if len(labels) < 2:
        raise UserError(f"classification needs at least two labels, the training rows have {list(labels)}")
    weights: tuple[float, ...] | None = None
    if config.class_weights == "balanced":
        empty = [label for label, count in zip(labels, counts, strict=True) if count == 0]
        if empty:
            raise UserError(f"task.class_weights=balanced: no training row has label {empty[0]!r}")
        weights = tuple(sum(counts) / (len(labels) * count) for count in counts)
    elif isinstance(config.class_weights, dict):
        for name in config.class_weights:
            if name not in labels:
                raise UserError(f"task.class_weights.{name}: unknown label: {nearest(name, labels)}")
        missing = [label for label in labels if label not in config.class_weights]
        if missing:
            raise UserError(f"task.class_weights: no weight for label {missing[0]!r}")
        weights = tuple(config.class_weights[label] for label in labels)
        if min(weights) < 0 or max(weights) == 0:
            raise UserError(f"task.class_weights={config.class_weights}: weights must not be negative, nor all zero")
    return Task(tuple(labels), config.label_smoothing, weights)
