"""A number for each text or text pair: ratings, scores, similarities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.regression import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, text_columns
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._correlation import pearson, spearman
from jaxft.tasks._numbers import encode_numbers, numbers_by_text, rounded
from jaxft.tasks._texts import by_text
from jaxft.tasks.contract import Answer, Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = True
ROW_OPTIONS: tuple[str, ...] = ()
PROBLEM: str | None = "regression"


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    name: str = "score"
    """What the number is called in answers."""
    loss: Literal["mse", "mae", "huber"] = "mse"

    head = "classification"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        return {
            "spearman": "max",
            "pearson": "max",
            "mse": "min",
            "rmse": "min",
            "mae": "min",
            "r2": "max",
            "loss": "min",
        }

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight(self, batch: Batch) -> Array:
        """The number of texts: what the summed loss is divided by."""
        return batch["weights"].sum()

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss`` and ``weight`` summed over a batch."""
        away = numbers_by_text(forward, batch, key) - by_text(batch["labels"])
        far = jnp.abs(away)
        loss = {"mse": away**2, "mae": far, "huber": jnp.where(far <= 1, 0.5 * away**2, far - 0.5)}[self.loss]
        return {"loss": (loss * by_text(batch["weights"])).sum(), "weight": self.weight(batch)}

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """What the model says of each text, ``predicted``, beside ``labels``, float32 [B] ([B E] of packed rows)."""
        return {"predicted": numbers_by_text(forward, batch, None)} | {
            name: by_text(batch[name]) for name in ("labels", "weights")
        }

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, object]:
        """Correlations (Pearson's, and Spearman's of ranks), mean squared and absolute errors, and ``r2``, the share of the variance
        that is explained. Scores of no rows are NaN, and so are those that need variance where there is none."""
        assert outputs is not None
        said, right = (np.asarray(outputs[name], np.float64) for name in ("predicted", "labels"))
        rows = len(right)
        mse = float(((said - right) ** 2).mean()) if rows else math.nan
        constant = not rows or bool((right == right[0]).all())
        return {
            "loss": float(sums["loss"]) / (float(sums["weight"]) or math.nan),
            "spearman": spearman(said, right),
            "pearson": pearson(said, right),
            "mse": mse,
            "rmse": math.sqrt(mse) if mse >= 0 else math.nan,
            "mae": float(np.abs(said - right).mean()) if rows else math.nan,
            "r2": math.nan if constant else 1 - mse / float(right.var()),
            "rows": rows,
        }

    def learnable(self, split: Split) -> int:
        """The number of rows."""
        return len(split)

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """``number`` [B] float32 of each row."""
        return {"number": numbers_by_text(forward, batch, None)}

    def answer(self, texts: Sequence[object], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """The number of a text (or pair), under the name of its column; None instead of NaN."""
        number = float(parts[0][1]["number"])
        said = math.isfinite(number)
        return Answer({self.name: rounded(number)}, {"predicted": rounded(number)}, not said)

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each row, its number beside what the model says, and by how much that is too high: see
        :class:`~jaxft.tasks.contract.Judging`."""
        back = order.argsort()
        for row, true, said in zip(
            rows, *(outputs[name][back].tolist() for name in ("labels", "predicted")), strict=True
        ):
            texts = dict(zip(("text", "pair"), row[:-1], strict=False))
            yield {**texts, "true": rounded(true), "predicted": rounded(said), "error": rounded(said - true)}

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """By how much a number is off: see :class:`~jaxft.tasks.contract.Grading`."""
        error = cast("float | None", judged["error"])
        return None if error == 0 else math.inf if error is None else abs(error)


def columns(config: RunConfig) -> tuple[Column, ...]:
    """A text, its pair if there is one, and a number."""
    return *text_columns(config.data), Column(config.data.label, "number")


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """The name of the number: that of the head to be trained further, or of its column.

    Raises:
      UserError: ``data.labels`` names classes.
    """
    del rows, note
    if config.data.labels is not None:
        raise UserError("data.labels names classes, and task.name=regression has none; leave it out")
    kept = stored.labels if stored is not None and len(stored.labels) == 1 else (config.data.label,)
    return Targets(kept, (), PROBLEM)


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per row: ``tokens``, ``types`` and, with targets, ``labels``: its number.

    Raises:
      UserError: what should be a number is none, or not finite.
    """
    yield from encode_numbers(rows, tokenizer, config.data.label, labelled=targets is not None)


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of texts, and ``labels`` [B] float32."""
    del config
    return {**text_fields(pad_id), "labels": Field(("batch",), "float32")}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: the head gives several numbers.
    """
    del facts, tokenizer
    if len(targets.labels) > 1:
        raise UserError(f"regression gives each text one number, and the model's head gives {len(targets.labels)}")
    name = targets.labels[0] if targets.labels else "score"
    return Task("score" if name.startswith("LABEL_") else name, options.loss)
