"""Several labels, or none, for each text or text pair: topics, emotions, tags."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.multi_label import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, chunks_of, encode_texts, text_columns
from jaxft.data.examples import Encoded, Split
from jaxft.data.labels import class_ids, label_text, renamed_labels
from jaxft.data.packing import CLASSES
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.row_rules import label_map
from jaxft.data.sources.read import shown
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError, nearest
from jaxft.models.contract import Facts
from jaxft.tasks._calibration import expected_calibration_error, reliability, sigmoid, temperature_of_labels
from jaxft.tasks._classes import class_names, distinct
from jaxft.tasks._focal import binary_losses
from jaxft.tasks._ranking import auroc, average_precision
from jaxft.tasks._texts import by_text, logits_by_text
from jaxft.tasks._thresholds import stored, tuned
from jaxft.tasks.contract import Answer, Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = True
ROW_OPTIONS: tuple[str, ...] = ("separator",)
PROBLEM: str | None = "multi_label_classification"
LABEL_MAP = True
"""``data.label_map`` is obeyed here: a row has several labels, in a cell of a table perhaps."""

MOST_RANKED_CLASSES = 200
"""Beyond this many classes rows are not ranked by each of them: the probabilities of all rows and classes would have to be kept."""
_MOST_PROBABILITY_COLUMNS = 20
_BETWEEN = "|"
"""Between the labels of a row in a table."""


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    labels: tuple[str, ...]
    """Label names in the order of class ids."""
    class_weights: tuple[float, ...] | None = None
    """What the loss of each label counts where a row has it, or None for 1 each."""
    threshold: float | tuple[float, ...] = 0.5
    """Probability from which on a label is given to a text: of all labels, or of each."""
    top: int | None = None
    """How many labels an answer has probabilities of, the most probable ones. None: all."""

    head_bias: tuple[float, ...] | None = None
    """What a fresh head's bias begins with: the log odds of each label in training. From 0, where each label is as likely as not, the first
    steps push all texts the same way, and what an encoder has learnt is lost on it (Lin et al. 2017, section 3.3). None: 0."""
    focal_gamma: float = 0.0
    """Power of 1 - p that each decision's loss is multiplied by (Lin et al. 2017)."""

    head = "classification"

    def __post_init__(self) -> None:
        for threshold in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            if not 0 <= threshold <= 1:
                raise UserError(f"--threshold {threshold}: must lie in 0..1")

    def decided(self, folder: Path, note: Note) -> Task:
        """With the thresholds stored in a model's folder: see :class:`~jaxft.tasks.contract.Deciding`."""
        assert not isinstance(self.threshold, tuple)  # a run has one
        return replace(self, threshold=stored(folder, self.labels, self.labels, self.threshold, note))

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        ranking: dict[str, Direction] = {
            "macro_auroc": "max",
            "macro_average_precision": "max",
            "macro_ece": "min",
            "macro_brier": "min",
        }
        counts: dict[str, Direction] = {"micro_f1": "max", "macro_f1": "max", "samples_f1": "max", "exact_match": "max"}
        return {**counts, "hamming_loss": "min", "loss": "min", **(ranking if self._ranked else {})}

    @property
    def _ranked(self) -> bool:
        return len(self.labels) <= MOST_RANKED_CLASSES

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight(self, batch: Batch) -> Array:
        """The number of texts: what the summed loss is divided by."""
        return batch["weights"].sum()

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """Sums over a batch: ``loss`` (the mean over labels of binary cross-entropies) and ``weight``; ``true``, ``predicted`` and
        ``correct`` [C] by label; ``exact``, texts whose labels are all right, and ``f1``, of each text's labels."""
        logits, labels = _logits(forward, batch, key), _labels(batch)
        count, said = by_text(batch["weights"]), self._said(logits)
        both = (said * labels).sum(-1)
        either = said.sum(-1) + labels.sum(-1)
        return {
            "loss": (self._loss(logits, labels) * count).sum(),
            "weight": self.weight(batch),
            "true": (labels * count[:, None]).sum(0),
            "predicted": (said * count[:, None]).sum(0),
            "correct": (said * labels * count[:, None]).sum(0),
            "exact": ((said == labels).all(-1) * count).sum(),
            "f1": (2 * both / jnp.maximum(either, 1) * count).sum(),
        }

    def _loss(self, logits: Array, labels: Array) -> Array:
        """[texts], as torch's ``binary_cross_entropy_with_logits`` with ``pos_weight``, averaged over labels; each decision's times
        (1 - p)^gamma, p being the probability of what is right."""
        positive = 1.0 if self.class_weights is None else jnp.asarray(self.class_weights, jnp.float32)
        missed, false = binary_losses(logits, self.focal_gamma)
        return (positive * labels * missed + (1 - labels) * false).mean(-1)

    def _said(self, logits: Array) -> Array:
        cut = jnp.asarray(self.threshold, jnp.float32) if isinstance(self.threshold, tuple) else self.threshold
        return (jax.nn.sigmoid(logits) >= cut).astype(jnp.float32)

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """``margins``, the logits, their ``chances``, probabilities, float32, and ``labels`` [texts, C]; of very many labels only which
        ones are ``said``."""
        logits, labels = _logits(forward, batch, None), _labels(batch).astype(jnp.int8)
        said = {"said": self._said(logits).astype(jnp.int8)}
        return {
            **said,
            # Probabilities of the program itself: thresholds tuned on them part rows as it does, to the last bit.
            **({"margins": logits, "chances": jax.nn.sigmoid(logits)} if self._ranked else {}),
            "labels": labels,
            "weights": by_text(batch["weights"]),
        }

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, object]:
        """F1 over all decisions (micro), averaged over labels (macro) and over texts (samples), the share of texts whose labels are all
        right, the share of wrong decisions (Hamming), and of each label precision, recall, F1, area under the ROC curve and average
        precision; the macro averages of the last two are over labels that have both kinds of rows.

        What is never there and never predicted has an F1 of 0, as in scikit-learn. Scores of no rows are NaN.
        """
        hits, true, predicted = (np.rint(sums[name]).astype(np.int64) for name in ("correct", "true", "predicted"))
        rows = 0 if outputs is None else len(outputs["weights"])
        some = rows or math.nan
        precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(true, 1)
        f1 = 2 * hits / np.maximum(true + predicted, 1)
        wrong = float((true + predicted - 2 * hits).sum())
        scores: dict[str, object] = {
            "loss": float(sums["loss"]) / (float(sums["weight"]) or math.nan),
            "micro_f1": 2 * float(hits.sum()) / max(float(true.sum() + predicted.sum()), 1) if rows else math.nan,
            "macro_f1": float(f1.mean()) if rows else math.nan,
            "samples_f1": float(sums["f1"]) / some,
            "exact_match": float(sums["exact"]) / some,
            "hamming_loss": wrong / (some * len(self.labels)),
            "rows": rows,
        }
        table = {
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for label, p, r, f, n in zip(self.labels, precision, recall, f1, true, strict=True)
        }
        if outputs is not None and self._ranked:
            for i, row in enumerate(table.values()):
                margins, positive = outputs["margins"][:, i], outputs["labels"][:, i] > 0
                row |= {"auroc": auroc(margins, positive), "average_precision": average_precision(margins, positive)}
            both = [row for row in table.values() if not math.isnan(row["auroc"])]
            for name in ("auroc", "average_precision"):
                scores[f"macro_{name}"] = float(np.mean([row[name] for row in both])) if both else math.nan
            chances, true = sigmoid(outputs["margins"]), outputs["labels"] > 0
            for i, row in enumerate(table.values()):
                row["ece"] = expected_calibration_error(chances[:, i], true[:, i])
                row["brier"] = float(np.square(chances[:, i] - true[:, i]).mean()) if rows else math.nan
            for name in ("ece", "brier"):
                scores[f"macro_{name}"] = float(np.mean([row[name] for row in table.values()]))
        return {**scores, "classes": table}

    def reported(self, outputs: Arrays) -> dict[str, object]:
        """``calibration`` of all probabilities of all labels: bins, and the temperature that would give the least cross-entropy; up to
        ``MOST_RANKED_CLASSES`` labels. ``thresholds``: of each label the one of the highest F1. See
        :class:`~jaxft.tasks.contract.Reporting`."""
        if not self._ranked:
            return {}
        margins, true = outputs["margins"].astype(np.float64), outputs["labels"] > 0
        found: dict[str, object] = {"bins": reliability(sigmoid(margins).ravel(), true.ravel())}
        found["temperature"] = best = temperature_of_labels(margins, true)
        if best is not None:
            chances = sigmoid(margins / best)
            errors = (expected_calibration_error(*both) for both in zip(chances.T, true.T, strict=True))
            found["macro_ece_at_temperature"] = float(np.mean(list(errors)))
        return {"calibration": found, "thresholds": tuned(outputs["chances"], true, self.labels)}

    def learnable(self, split: Split) -> int:
        """The number of rows."""
        return len(split)

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """``probabilities`` [B, C] float32 of each row."""
        return {"probabilities": jax.nn.sigmoid(_logits(forward, batch, None))}

    def answer(self, texts: Sequence[object], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """The labels of a text (or pair) whose probability reaches the threshold, and the probabilities of all; None instead of NaN."""
        found = parts[0][1]["probabilities"]
        unsaid = bool(np.isnan(found).any())
        chosen = (
            None
            if unsaid
            else [self.labels[i] for i in np.flatnonzero(found >= np.asarray(self.threshold, np.float32))]
        )
        order = (-found).argsort(kind="stable")[: self.top]
        cells = {"predicted": None if chosen is None else _BETWEEN.join(chosen)}
        if len(self.labels) <= _MOST_PROBABILITY_COLUMNS:
            cells |= {f"probability_{name}": _rounded(p) for name, p in zip(self.labels, found, strict=True)}
        return Answer(
            {"labels": chosen, "probabilities": {self.labels[i]: _rounded(found[i]) for i in order}}, cells, unsaid
        )

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each row, its labels beside those predicted: see :class:`~jaxft.tasks.contract.Judging`."""
        back = order.argsort()
        for row, true, said in zip(rows, outputs["labels"][back], outputs["said"][back], strict=True):
            named = [_BETWEEN.join(self.labels[i] for i in np.flatnonzero(one)) for one in (true, said)]
            texts = dict(zip(("text", "pair"), row[:-1], strict=False))
            wrong = int((true != said).sum())
            yield {**texts, "true": named[0], "predicted": named[1], "right": not wrong, "wrong": wrong}

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """How many labels are wrong: see :class:`~jaxft.tasks.contract.Grading`."""
        return None if judged["right"] else float(cast(int, judged["wrong"]))


def _logits(forward: Forward, batch: Batch, key: Array | None) -> Array:
    return logits_by_text(forward(batch, key)).astype(jnp.float32)


def _labels(batch: Batch) -> Array:
    """[texts, C] float32, 1 for each label of a text."""
    return batch["labels"].reshape(-1, batch["labels"].shape[-1]).astype(jnp.float32)


def _rounded(probability: np.floating) -> float | None:
    return None if math.isnan(probability) else round(float(probability), 6)


def columns(config: RunConfig) -> tuple[Column, ...]:
    """A text, its pair if there is one, and a list of labels."""
    return *text_columns(config.data), Column(config.data.label, "labels")


def _of_row(row: Row, separator: str | None, renamed: Mapping[str, str | None] | None = None) -> list[object]:
    """The labels of a row; those whose other name is None are taken off it."""
    if renamed:
        names = [(value, label_text(value)) for value in _of_row(row, separator)]
        found = [renamed.get(name, value) for value, name in names]
        return [value for value in found if value is not None]
    value = row.values[-1]
    if isinstance(value, list):
        if any(isinstance(one, Mapping) for one in value):
            raise UserError(f"{row.where}: expected a list of labels, found {value!r:.60}")
        return list(value)
    if separator is None or not isinstance(value, str):
        return [value]
    return [part.strip() for part in value.split(separator) if part.strip()]


def _separator(config: RunConfig) -> str | None:
    return config.task.separator if isinstance(config.task, Config) else None


def row_labels(config: RunConfig) -> Callable[[Row], list[object]]:
    """What tells the labels of a row: see :class:`~jaxft.tasks.contract.Labelled`."""
    separator, renamed = _separator(config), label_map(config.data.label_map)
    return lambda row: _of_row(row, separator, renamed)


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """The labels of the training rows.

    Raises:
      UserError: no row has one.
    """
    separator, renamed = _separator(config), label_map(config.data.label_map)
    counts = dict.fromkeys(renamed, 0)

    def counted() -> Iterator[list[object]]:
        for row in rows:
            for name in {label_text(value) for value in _of_row(row, separator)} & counts.keys() if counts else ():
                counts[name] += 1
            yield _of_row(row, separator, renamed)

    values = distinct(chain.from_iterable(counted()))
    for name, to in renamed.items():
        done = f"is {to!r} in" if to is not None else "is taken off"
        note(f"{shown(config.data.train or '')}: data.label_map: {name!r} {done} {counts[name]} rows")
    if not values:
        raise UserError(f"{config.data.train}: no row has a label (column {config.data.label!r}, data.label)")
    return Targets(class_names(values, config, stored, note), (), PROBLEM)


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per row: ``tokens``, ``types`` and, with targets, ``labels`` [C] int32: 1 for each that the row has.

    Raises:
      UserError: a label that is none of the classes.
    """
    renamed = {} if targets is None else renamed_labels(config.data.labels, targets.labels)
    separator, mapped = _separator(config), label_map(config.data.label_map)
    for first, chunk in chunks_of(rows):
        for one in encode_texts(chunk, tokenizer, paired=len(chunk[0].values) - (targets is not None) == 2):
            more = {}
            if targets is not None:
                row = chunk[one.row]
                values = _of_row(row, separator, mapped)
                marks = np.zeros(len(targets.labels), np.int32)
                marks[class_ids(values, [row.where] * len(values), targets.labels, renamed)] = 1
                more = {"labels": marks}
            yield one._replace(row=first + one.row, example={**one.example, **more})


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of texts, and ``labels`` [B, C] int32."""
    del config
    return {**text_fields(pad_id), "labels": Field(("batch", CLASSES))}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: no labels, or weights that cannot be.
    """
    del facts, tokenizer
    if not targets.labels:
        raise UserError("multi_label needs at least one label, the training rows have none")
    weights = _weights(options.class_weights, targets)
    bias = _log_odds(targets, weights)
    return Task(targets.labels, weights, options.threshold, head_bias=bias, focal_gamma=options.focal_gamma)


def _log_odds(targets: Targets, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """The log odds of each label in training, as the loss weighs rows that have it; one row more has it, and one more has not, so that none
    is infinite."""
    if not targets.rows:
        return None
    each = zip(targets.counts, weights or (1.0,) * len(targets.counts), strict=True)
    return tuple(math.log((count * weight + 1) / (targets.rows - count + 1)) for count, weight in each)


def _weights(wanted: str | Mapping[str, float], targets: Targets) -> tuple[float, ...] | None:
    if wanted == "balanced":
        for label, count in zip(targets.labels, targets.counts, strict=True):
            if count == 0:
                raise UserError(f"task.class_weights=balanced: no training row has label {label!r}")
        return tuple((targets.rows - count) / count for count in targets.counts)
    if not isinstance(wanted, Mapping):
        return None
    for name, weight in wanted.items():
        if name not in targets.labels:
            raise UserError(f"task.class_weights.{name}: unknown label: {nearest(name, targets.labels)}")
        if not 0 <= weight < math.inf:
            raise UserError(f"task.class_weights.{name}={weight}: a weight must be a number that is not negative")
    return tuple(wanted.get(label, 1.0) for label in targets.labels)
