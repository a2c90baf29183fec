"""How well a passage answers a query: cross-encoders that put the passages of each query in order (Nogueira and Cho 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.reranking import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, text_columns
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._numbers import encode_numbers, number_of, numbers_by_text, rounded
from jaxft.tasks._retrieval import retrieval_scores
from jaxft.tasks._texts import by_text
from jaxft.tasks.contract import Answer, Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = True
ROW_OPTIONS: tuple[str, ...] = ()
PROBLEM: str | None = "regression"
"""The reference's own cross-encoders have one output and state no ``problem_type``, which means this one."""


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    at: int = 10
    positive_weight: float = 1.0

    head = "classification"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        at = self.at
        return {
            f"ndcg@{at}": "max",
            f"mrr@{at}": "max",
            f"recall@{at}": "max",
            "map": "max",
            "hit@1": "max",
            "loss": "min",
        }

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight(self, batch: Batch) -> Array:
        """The number of pairs: what the summed loss is divided by."""
        return batch["weights"].sum()

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss`` and ``weight`` summed over a batch: binary cross-entropies, as torch's ``binary_cross_entropy_with_logits`` with
        ``pos_weight``."""
        logits, right = numbers_by_text(forward, batch, key), by_text(batch["labels"])
        loss = self.positive_weight * right * jax.nn.softplus(-logits) + (1 - right) * jax.nn.softplus(logits)
        return {"loss": (loss * by_text(batch["weights"])).sum(), "weight": self.weight(batch)}

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """The ``margin`` of each pair, its logit, beside ``labels`` and the number of its ``query``, [B] ([B E] of packed rows)."""
        found = {"margin": numbers_by_text(forward, batch, None)}
        return found | {name: by_text(batch[name]) for name in ("labels", "query", "weights")}

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, object]:
        """How well the passages of each query are put in order, see :func:`~jaxft.tasks._retrieval.retrieval_scores`."""
        assert outputs is not None
        ranks = retrieval_scores(outputs["query"], outputs["margin"], outputs["labels"], self.at)
        loss = float(sums["loss"]) / (float(sums["weight"]) or math.nan)
        return {"loss": loss, **ranks, "rows": len(outputs["labels"])}

    def learnable(self, split: Split) -> int:
        """The number of rows."""
        return len(split)

    def remarks(self, split: Split) -> Iterator[str]:
        """A line on queries that nothing can be learnt or scored of."""
        queries, labels = split.columns["query"], split.columns["labels"]
        found = np.unique(queries)
        without = len(found) - len(np.unique(queries[labels > 0]))
        alone = int((np.bincount(queries) == 1).sum())
        if without or alone:
            yield (
                f"{split.name}: of {len(found)} queries, {without} have no passage that answers (they are not scored) and {alone} have "
                "one passage alone (always in order)"
            )

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """``score`` [B] float32 of each pair, in 0..1."""
        return {"score": jax.nn.sigmoid(numbers_by_text(forward, batch, None))}

    def answer(self, texts: Sequence[object], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """How well a passage answers, 0..1; None instead of NaN."""
        score = float(parts[0][1]["score"])
        return Answer({"score": rounded(score)}, {"score": rounded(score)}, math.isnan(score))

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each row, its relevance beside its score, and its place among the passages of its query: see
        :class:`~jaxft.tasks.contract.Judging`."""
        back = order.argsort()
        margins, queries = outputs["margin"][back], outputs["query"][back]
        places = np.empty(len(margins), np.int64)
        sorting = np.lexsort((-margins, queries))
        first = np.flatnonzero(np.append(True, np.diff(queries[sorting]) != 0))
        places[sorting] = np.arange(len(margins)) - np.repeat(first, np.diff(np.append(first, len(margins)))) + 1
        scores = 1 / (1 + np.exp(-np.clip(margins.astype(np.float64), -700, 700)))
        for row, true, score, place in zip(
            rows, outputs["labels"][back].tolist(), scores.tolist(), places.tolist(), strict=True
        ):
            yield {"text": row[0], "pair": row[1], "true": rounded(true), "score": rounded(score), "place": place}

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """By how much a score is off, if by more than a half: see :class:`~jaxft.tasks.contract.Grading`."""
        true, score = (cast("float | None", judged[name]) for name in ("true", "score"))
        if true is None or score is None:
            return math.inf
        off = abs(true - score)
        return off if off > 0.5 else None


def columns(config: RunConfig) -> tuple[Column, ...]:
    """A query, a passage, and how relevant it is.

    Raises:
      UserError: no column is named for passages.
    """
    if config.data.text_pair is None:
        raise UserError(
            "reranking reads a query and a passage: name the columns, for instance data.text=query data.text_pair=passage "
            "data.label=relevance"
        )
    return *text_columns(config.data), Column(config.data.label, "number")


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """The name of the head's only output: that of the head to be trained further, or of its column."""
    del rows, note
    kept = stored.labels if stored is not None and len(stored.labels) == 1 else (config.data.label,)
    return Targets(kept, (), PROBLEM)


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per row: ``tokens``, ``types`` and, with targets, ``labels``, its relevance, and ``query``, the number of its query.

    Rows of one query need not stand together: queries are the same if their texts are.

    Raises:
      UserError: a relevance that is no number from 0 to 1.
    """
    numbers: dict[str, int] = {}
    found: list[int] = []

    def counted(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            if targets is not None and not 0 <= number_of(row, config.data.label) <= 1:
                raise UserError(
                    f"{row.where}: column {config.data.label!r} holds {row.values[-1]!r:.60}; how relevant a passage is must be a number "
                    "from 0 to 1 (divide grades by the highest)"
                )
            found.append(numbers.setdefault(str(row.values[0]), len(numbers)))
            yield row

    for one in encode_numbers(counted(rows), tokenizer, config.data.label, labelled=targets is not None):
        more = {} if targets is None else {"query": np.asarray(found[one.row], np.int32)}
        yield one._replace(example={**one.example, **more})


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of texts, ``labels`` [B] float32 and ``query`` [B] int32."""
    del config
    return {**text_fields(pad_id), "labels": Field(("batch",), "float32"), "query": Field(("batch",))}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: the head gives several numbers.
    """
    del facts, tokenizer
    if len(targets.labels) > 1:
        raise UserError(f"reranking gives each pair one number, and the model's head gives {len(targets.labels)}")
    return Task(options.at, options.positive_weight)
