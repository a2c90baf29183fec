"""Single-label classification of a text or a text pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.classification import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, chunks_of, encode_texts, label_column, text_columns
from jaxft.data.examples import Encoded, Split
from jaxft.data.labels import class_ids, renamed_labels
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._bootstrap import intervals_of_classes, intervals_of_ranking
from jaxft.tasks._calibration import (
    brier_score,
    expected_calibration_error,
    reliability,
    softmax,
    temperature_of_classes,
)
from jaxft.tasks._classes import class_names, class_weights
from jaxft.tasks._focal import focal
from jaxft.tasks._ranking import auroc, average_precision, best_cut
from jaxft.tasks._texts import by_text, logits_by_text
from jaxft.tasks._thresholds import stored, tuned
from jaxft.tasks.contract import Answer, Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = True
ROW_OPTIONS: tuple[str, ...] = ()
PROBLEM: str | None = "single_label_classification"

MOST_CONFUSION_CLASSES = 200
"""Beyond this many classes no confusion matrix is counted: of 3,000 it would take 36 MB for each batch."""
_MOST_PROBABILITY_COLUMNS = 20


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    labels: tuple[str, ...]
    """Label names in the order of class ids."""
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """One weight per class, or None for 1 each."""
    threshold: float | None = None
    """Probability from which on the second of two classes is predicted. None: the more probable class is."""
    top: int | None = None
    """How many labels an answer has probabilities of, the most probable ones. None: all."""
    focal_gamma: float = 0.0
    """See :func:`cross_entropy`."""

    head = "classification"

    def __post_init__(self) -> None:
        if self.threshold is None:
            return
        self._check_binary()
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: must lie in 0..1")

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        ranking: dict[str, Direction] = {"auroc": "max", "average_precision": "max"} if self._binary else {}
        brier: dict[str, Direction] = {"brier": "min"} if self._few else {}
        return {
            "accuracy": "max",
            "macro_f1": "max",
            "micro_f1": "max",
            "weighted_f1": "max",
            "mcc": "max",
            "loss": "min",
            **ranking,
            "ece": "min",
            **brier,
        }

    @property
    def _binary(self) -> bool:
        return len(self.labels) == 2

    def _check_binary(self) -> None:
        if not self._binary:
            raise UserError(f"--threshold is for models of two labels; this one has {len(self.labels)}")

    def decided(self, folder: Path, note: Note) -> Task:
        """With the threshold stored in a model's folder: see :class:`~jaxft.tasks.contract.Deciding`."""
        self._check_binary()
        return replace(self, threshold=stored(folder, self.labels, self.labels[1:], 0.5, note)[0])

    @property
    def _few(self) -> bool:
        return len(self.labels) <= MOST_CONFUSION_CLASSES

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight(self, batch: Batch) -> Array:
        """The total weight of a batch: what the summed loss is divided by."""
        return self.row_weights(batch).sum()

    def row_weights(self, batch: Batch) -> Array:
        """[B] what each row counts ([B, E] of packed ones)."""
        return of_labels(batch["weights"], batch["labels"], self.class_weights)

    def losses(self, logits: Array, batch: Batch) -> Array:
        """[B] the loss of each row ([B E] of packed ones)."""
        labels = by_text(batch["labels"])
        return cross_entropy(logits, labels, self.label_smoothing, self.class_weights, self.focal_gamma)

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss``, ``weight`` (scalars), ``true``, ``predicted`` and ``correct`` [C] rows per class summed over a batch.

        Up to ``MOST_CONFUSION_CLASSES`` classes also ``confusion`` [C true, C predicted]. Rows of weight 0 (padding of the last
        batch) add nothing.
        """
        logits, labels = logits_by_text(forward(batch, key)), by_text(batch["labels"])
        loss = self.losses(logits, batch)
        count = by_text(batch["weights"])
        true, predicted = (jax.nn.one_hot(ids, len(self.labels)) for ids in (labels, self._predicted(logits)))
        counted = true * count[:, None]
        sums = {
            "loss": (loss * count).sum(),
            "weight": self.weight(batch),
            "true": counted.sum(0),
            "predicted": (predicted * count[:, None]).sum(0),
            "correct": (predicted * counted).sum(0),
        }
        if self._few:
            sums["confusion"] = jnp.einsum("bt,bp->tp", counted, predicted, precision="highest")
        return sums

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """What the model says of each text: ``predicted`` int32 and its ``probability`` float32, [B] ([B E] of packed rows).

        Up to ``MOST_CONFUSION_CLASSES`` classes also all ``logits`` [B, C], which calibration is computed from in float64.
        Of two classes also ``positive``, the probability of the second, and ``margin``, by how much its logit is higher [B]: unlike
        the probability, it does not round to 1.
        """
        logits = logits_by_text(forward(batch, None)).astype(jnp.float32)
        probabilities, predicted = jax.nn.softmax(logits, axis=-1), self._predicted(logits)
        chosen = jax.nn.one_hot(predicted, len(self.labels))
        found = {"predicted": predicted, "probability": jnp.where(chosen > 0, probabilities, 0.0).sum(-1)}
        if self._few:
            found["logits"] = logits
        if self._binary:
            found |= {"positive": probabilities[:, 1], "margin": logits[:, 1] - logits[:, 0]}
        return found | {name: by_text(batch[name]) for name in ("labels", "weights")}

    def _predicted(self, logits: Array) -> Array:
        if self.threshold is None:
            return logits.argmax(-1)
        return (jax.nn.softmax(logits.astype(jnp.float32), axis=-1)[:, 1] >= self.threshold).astype(jnp.int32)

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """``probabilities`` [B, C] float32 of each row."""
        return {"probabilities": jax.nn.softmax(logits_by_text(forward(batch, None)), axis=-1)}

    def answer(self, texts: Sequence[object], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """The label of a text (or pair), its probability, and the probabilities of all labels; None instead of NaN."""
        probabilities = parts[0][1]["probabilities"]
        unsaid = bool(np.isnan(probabilities).any())
        cut = None if self.threshold is None else np.float32(self.threshold)
        best = int(probabilities.argmax() if cut is None else probabilities[1] >= cut)
        label, probability = (None, None) if unsaid else (self.labels[best], _rounded(probabilities[best]))
        order = (-probabilities).argsort(kind="stable")[: self.top]
        by_label = {self.labels[i]: _rounded(probabilities[i]) for i in order}
        cells = {"predicted": label, "probability": probability}
        if len(self.labels) <= _MOST_PROBABILITY_COLUMNS:
            cells |= {f"probability_{name}": _rounded(p) for name, p in zip(self.labels, probabilities, strict=True)}
        record = {"label": label, "probability": probability, "probabilities": by_label}
        return Answer(record, cells, unsaid)

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each row, its true label beside what the model says: see :class:`~jaxft.tasks.contract.Judging`."""
        back = order.argsort()
        found = (outputs[name][back].tolist() for name in ("labels", "predicted", "probability"))
        for row, true, predicted, probability in zip(rows, *found, strict=True):
            said = not math.isnan(probability)
            yield {
                **dict(zip(("text", "pair"), row[:-1], strict=False)),
                "true": self.labels[true],
                "predicted": self.labels[predicted] if said else None,
                "probability": round(probability, 6) if said else None,
                "right": said and true == predicted,
            }

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """The probability of a wrong label; 0 where the model says none: see :class:`~jaxft.tasks.contract.Grading`."""
        return None if judged["right"] else cast(float, judged["probability"] or 0.0)

    def learnable(self, split: Split) -> int:
        """The number of rows."""
        return len(split)

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, Any]:
        """Accuracy, F1 (macro, micro, weighted by true rows), Matthews' correlation coefficient, per-class precision/recall/F1, and the
        confusion matrix if it was counted.

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
        scores: dict[str, object] = {
            "loss": float(sums["loss"]) / (float(sums["weight"]) or math.nan),
            "accuracy": float(hits.sum()) / (rows or math.nan),
            "macro_f1": float(f1[seen].mean()) if seen.any() else math.nan,
            # With exactly one label per row, micro precision = micro recall = micro F1 = accuracy.
            "micro_f1": 2 * float(hits.sum()) / (float(true.sum() + predicted.sum()) or math.nan),
            "weighted_f1": float((f1 * true).sum()) / (rows or math.nan),
            "mcc": _matthews(hits, true, predicted),
            **(self._ranking(outputs) if self._binary and outputs is not None else {}),
            **(self._calibration(outputs) if outputs is not None else {}),
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

    def _calibration(self, outputs: Arrays, temperature: float = 1.0) -> dict[str, float]:
        """Calibration of the most probable class, whatever the threshold; the Brier score is of all classes."""
        said, came = self._confidence(outputs, temperature)
        found = {"ece": expected_calibration_error(said, came)}
        if self._few:
            found["brier"] = brier_score(softmax(outputs["logits"].astype(np.float64) / temperature), outputs["labels"])
        return found

    def _confidence(self, outputs: Arrays, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """The probability of each row's most probable class, and whether it is that one."""
        if not self._few:
            return outputs["probability"], outputs["predicted"] == outputs["labels"]
        probabilities = softmax(outputs["logits"].astype(np.float64) / temperature)
        return probabilities.max(-1), probabilities.argmax(-1) == outputs["labels"]

    def reported(self, outputs: Arrays) -> dict[str, object]:
        """``calibration``: bins of confidence, and the temperature that would give the least cross-entropy (up to
        ``MOST_CONFUSION_CLASSES`` classes).
        ``intervals``: where 95 % of resamples of the rows have scores. ``thresholds``, of two classes: the one of the highest F1 of the
        second. See :class:`~jaxft.tasks.contract.Reporting`."""
        found: dict[str, object] = {"bins": reliability(*self._confidence(outputs))}
        if self._few:
            best = temperature_of_classes(outputs["logits"], outputs["labels"])
            at_best = {} if best is None else self._calibration(outputs, best)
            found |= {"temperature": best, **{f"{name}_at_temperature": value for name, value in at_best.items()}}
        ranking = intervals_of_ranking(outputs["margin"], outputs["labels"] == 1) if self._binary else {}
        # A model that gives no numbers predicts nothing.
        said = not np.isnan(outputs["probability"]).any()
        counted = intervals_of_classes(outputs["labels"], outputs["predicted"], len(self.labels)) if said else {}
        cuts = {}
        if self._binary:
            cuts["thresholds"] = tuned(outputs["positive"][:, None], outputs["labels"][:, None] == 1, self.labels[1:])
        return {"calibration": found, "intervals": {**counted, **ranking}, **cuts}

    def _ranking(self, outputs: Mapping[str, np.ndarray]) -> dict[str, object]:
        positive = outputs["labels"] == 1
        cut = best_cut(outputs["positive"], positive)
        return {
            "auroc": auroc(outputs["margin"], positive),
            "average_precision": average_precision(outputs["margin"], positive),
            "positive": self.labels[1],
            "best_threshold": None if cut is None else {"threshold": cut.threshold, "f1": cut.f1},
        }


def _matthews(hits: np.ndarray, of_class: np.ndarray, said: np.ndarray) -> float:
    """Matthews' correlation coefficient of several classes (Gorodkin 2004), from counts by class; 0 where all rows are of one class, or
    said to be, as in scikit-learn. NaN of no rows."""
    rows = int(of_class.sum())
    if not rows:
        return math.nan
    # Python's integers: squares of counts may be beyond 64 bits.
    true, predicted = of_class.tolist(), said.tolist()
    by_true, by_said = (rows**2 - sum(count**2 for count in counts) for counts in (true, predicted))
    together = sum(a * b for a, b in zip(true, predicted, strict=True))
    spread = by_true * by_said
    return (int(hits.sum()) * rows - together) / math.sqrt(spread) if spread else 0.0


def cross_entropy(
    logits: Array, labels: Array, smoothing: float = 0.0, weights: tuple[float, ...] | None = None, gamma: float = 0.0
) -> Array:
    """Per-row loss [B] of float logits [B, C] and int labels [B]; as torch's ``cross_entropy`` with ``label_smoothing`` and
    ``weight``, before its division by the summed weights of the true classes.

    With a ``gamma`` (Lin et al. 2017) the term of each class c is multiplied by (1 - p_c)^gamma: of the true class alone, or, with
    smoothing, of each in its share of the target.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    scale = jnp.ones(logits.shape[-1], jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    # one_hot rather than a gather: the backward pass of a gather is a scatter.
    chosen = jax.nn.one_hot(labels, logits.shape[-1])
    target = (1.0 - smoothing) * chosen + smoothing / logits.shape[-1]
    return -(target * scale * focal(logp, gamma)).sum(-1)


def of_labels(weights: Array, labels: Array, class_weights: tuple[float, ...] | None) -> Array:
    """Weights of rows times those of their classes."""
    return weights if class_weights is None else weights * jnp.asarray(class_weights, jnp.float32)[labels]


def _rounded(probability: np.floating) -> float | None:
    return None if math.isnan(probability) else round(float(probability), 6)


def columns(config: RunConfig) -> tuple[Column, ...]:
    """A text, its pair if there is one, and a label."""
    return *text_columns(config.data), label_column(config.data)


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """The labels of the training rows, and how often each occurs among them (held-out rows of the same source included)."""
    labels = class_names((row.values[-1] for row in rows), config, stored, note)
    return Targets(labels, (), PROBLEM)


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per row: ``tokens``, ``types`` and, with targets, ``labels``: the id of its class.

    Raises:
      UserError: a label that is none of the classes.
    """
    renamed = {} if targets is None else renamed_labels(config.data.labels, targets.labels)
    for first, chunk in chunks_of(rows):
        encoded = encode_texts(chunk, tokenizer, paired=len(chunk[0].values) - (targets is not None) == 2)
        if targets is None:
            yield from (one._replace(row=first + one.row) for one in encoded)
            continue
        values, where = (row.values[-1] for row in chunk), (row.where for row in chunk)
        ids = class_ids(values, where, targets.labels, renamed)
        for one in encoded:
            yield one._replace(row=first + one.row, example={**one.example, "labels": ids[one.row]})


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of texts, and ``labels`` [B] int32."""
    del config
    return {**text_fields(pad_id), "labels": Field(("batch",))}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: fewer than two labels, or class weights that do not name exactly the labels.
    """
    del facts, tokenizer
    labels = targets.labels
    if len(labels) < 2:
        raise UserError(f"classification needs at least two labels, the training rows have {list(labels)}")
    weights = class_weights(options.class_weights, targets)
    return Task(labels, options.label_smoothing, weights, focal_gamma=options.focal_gamma)
