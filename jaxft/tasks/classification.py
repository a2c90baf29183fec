"""Single-label classification of a text or a text pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import TaskConfig
from jaxft.errors import UserError, nearest

Array = jax.Array
Batch = dict[str, Array]
Sums = dict[str, Array]

LABELLED = True
END_TOKEN = False


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    labels: tuple[str, ...]
    """Label names in the order of class ids."""
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """One weight per class, or None for 1 each."""

    head = "classification"

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight_of(self, batch: Batch) -> Array:
        """The total weight of a batch: what the summed loss is divided by."""
        return _row_weights(batch, self.class_weights).sum()

    def sums(self, output: Any, batch: Batch) -> Sums:
        """``loss`` (scalar), ``weight`` (scalar) and ``confusion`` [C true, C predicted] summed over a batch.

        Rows of weight 0 (padding of the last batch) add nothing.
        """
        logits, labels = output.logits, batch["labels"]
        loss = cross_entropy(logits, labels, self.label_smoothing, self.class_weights)
        count = batch["weights"]
        true, predicted = (jax.nn.one_hot(ids, len(self.labels)) for ids in (labels, logits.argmax(-1)))
        return {
            "loss": (loss * count).sum(),
            "weight": self.weight_of(batch),
            "confusion": jnp.einsum("bt,bp,b->tp", true, predicted, count, precision="highest"),
        }

    def metrics(self, sums: dict[str, np.ndarray]) -> dict[str, Any]:
        """Accuracy, macro and micro F1, per-class precision/recall/F1 and the confusion matrix.

        A class that is never predicted has precision 0; one without true rows has recall 0; macro F1 averages the classes
        that have true or predicted rows (scikit-learn's default does the same).
        """
        confusion = np.rint(sums["confusion"]).astype(np.int64)
        hits, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        rows = int(confusion.sum())
        precision = hits / np.maximum(predicted, 1)
        recall = hits / np.maximum(true, 1)
        f1 = 2 * hits / np.maximum(true + predicted, 1)
        seen = (true + predicted) > 0
        return {
            "loss": float(sums["loss"] / max(float(sums["weight"]), 1e-30)),
            "accuracy": float(hits.sum() / max(rows, 1)),
            "macro_f1": float(f1[seen].mean()) if seen.any() else 0.0,
            # With exactly one label per row, micro precision = micro recall = micro F1 = accuracy.
            "micro_f1": float(2 * hits.sum() / max(true.sum() + predicted.sum(), 1)),
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
            "confusion": confusion.tolist(),
        }

    def metric_names(self) -> tuple[str, ...]:
        """The scalar metrics that ``eval.metric`` may name."""
        return ("loss", "accuracy", "macro_f1", "micro_f1")


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
