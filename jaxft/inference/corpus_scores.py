"""Corpora scored whole: each token of each document once, with the context that was asked for, by source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from jaxft.data.batch import Field, HostBatch, collate, text_fields, text_shape
from jaxft.data.corpus.origins import Origin, origins_of
from jaxft.data.corpus.store import Corpus, open_corpus
from jaxft.data.loader import bucket_of, make_buckets
from jaxft.errors import UserError
from jaxft.inference.predict import Served
from jaxft.tasks.contract import Batch, Exhaustive, Passage, Task
from jaxft.training.step import forward_of
from jaxft.trees import Params

_NEEDS_MORE = "models with the head {head} give no probability of each token of a document, and those of a corpus are scored; name rows"


@dataclass
class Sums:
    """What was counted of a source."""

    documents: int = 0
    tokens: int = 0
    size: int | None = 0
    """Bytes of its texts in UTF-8; None: the corpus does not say."""
    scored: int = 0
    loss: float = 0.0
    correct: int = 0

    def plus(self, other: Sums) -> Sums:
        """The sum of the two."""
        size = None if self.size is None or other.size is None else self.size + other.size
        return Sums(
            self.documents + other.documents,
            self.tokens + other.tokens,
            size,
            self.scored + other.scored,
            self.loss + other.loss,
            self.correct + other.correct,
        )

    def scores(self) -> dict[str, float]:
        """Mean loss in nats and what follows from it; NaN where nothing was scored. Without bytes, there are none a byte."""
        scored = self.scored or math.nan
        loss = self.loss / scored
        bits = self.loss / math.log(2)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self.correct / scored,
            "bits_per_token": bits / scored,
            **({} if not self.size else {"bits_per_byte": bits / self.size, "bytes": self.size}),
            "documents": self.documents,
            "tokens": self.tokens,
            "predicted_tokens": self.scored,
        }


class Row(NamedTuple):
    """A passage, and what it is of."""

    of: str | int
    passage: Passage


class Scored(NamedTuple):
    """What was found of a passage."""

    of: str | int
    tokens: int
    """Scored ones."""
    loss: float
    """The sum of theirs, in nats."""
    correct: int
    """How many of them were the most probable ones."""


def check_task(task: Task, head: str | None, where: str) -> Exhaustive:
    """The task as one that scores documents.

    Raises:
      UserError: it is not.
    """
    if not hasattr(task, "passages"):
        raise UserError(f"{where}: {_NEEDS_MORE.format(head=head)}")
    return cast(Exhaustive, task)


def score_corpora(served: Served, task: Exhaustive, folders: Sequence[Path]) -> tuple[Sums, dict[str, object]]:
    """What was counted of all corpora together, and its scores, with ``sources``, those of each source.

    Raises:
      UserError: a corpus is of another tokenizer, or the settings do not fit it.
    """
    config, tokenizer = served.config, served.tokenizer
    length = tokenizer.max_length or config.data.max_length
    stride = length // 2 if config.eval.stride is None else config.eval.stride
    if stride >= length:
        raise UserError(
            f"eval.stride={stride}: windows have {length} tokens (data.max_length, or the model's limit); choose less"
        )
    served.devices.check_batch("eval.batch_size", config.eval.batch_size)
    made = [open_corpus(folder) for folder in folders]
    for corpus in made:
        if corpus.key["tokenizer"] != tokenizer.digest():
            raise UserError(
                f"{corpus.name}: a corpus of another tokenizer than {tokenizer.folder}, which gives other ids; build it with that one "
                "(jaxft data build)"
            )
    origins = origins_of(folders)
    for folder, stretches in zip(folders, origins, strict=True):
        if any(one.size is None for one in stretches):
            served.note(
                f"{folder}: was built by an earlier version, which did not store bytes of texts; build it again for bits a byte"
            )
    found: dict[str, Sums] = {}
    rows = _rows(made, origins, task, length, stride, found)
    for scored in scores_of(served, task, rows, length):
        one = found[str(scored.of)]
        one.scored, one.loss, one.correct = (
            one.scored + scored.tokens,
            one.loss + scored.loss,
            one.correct + scored.correct,
        )
    total = Sums()
    for one in found.values():
        total = total.plus(one)
    return total, {**total.scores(), "sources": {name: one.scores() for name, one in found.items()}}


def _rows(
    made: Sequence[Corpus],
    stretches: Sequence[Sequence[Origin]],
    task: Exhaustive,
    length: int,
    stride: int,
    found: dict[str, Sums],
) -> Iterator[Row]:
    """The passages of all documents; counts documents, tokens and bytes of each source."""
    for corpus, origins in zip(made, stretches, strict=True):
        number = 0
        for origin in origins:
            one = found.setdefault(origin.source, Sums())
            one.size = None if one.size is None or origin.size is None else one.size + origin.size
            one.documents += origin.documents
            for _ in range(origin.documents):
                tokens = corpus.document(number)
                number += 1
                one.tokens += len(tokens)
                for passage in task.passages(tokens, length, stride):
                    yield Row(origin.source, passage)


def _batches(rows: Iterable[Row], size: int, buckets: tuple[int, ...]) -> Iterator[tuple[int, list[Row]]]:
    """(padded length, rows) of batches: as many rows of a length as are wanted together, and at the end what is left."""
    held: dict[int, list[Row]] = {}
    for row in rows:
        bucket = bucket_of(len(row.passage.tokens), buckets)
        held.setdefault(bucket, []).append(row)
        if len(held[bucket]) == size:
            yield bucket, held.pop(bucket)
    yield from sorted(held.items())


def scores_of(served: Served, task: Exhaustive, rows: Iterable[Row], length: int) -> Iterator[Scored]:
    """What is found of passages, in another order. The devices work on a batch while the host makes the next.

    Args:
      length: tokens of a passage, at most.
    """
    places = ("batch", "length")
    fields = {**text_fields(served.tokenizer.pad_id), "targets": Field(places), "scored": Field(places)}
    size, buckets = served.config.eval.batch_size, make_buckets(None, length)

    def sums(params: Params, batch: Batch) -> Batch:
        return task.passage_scores(forward_of(served.model, params), batch)

    program = served.devices.compiled(sums, fields)
    waiting: list[tuple[list[Row], Batch]] = []
    for bucket, some in _batches(rows, size, buckets):
        batch: HostBatch = collate([_example(row.passage) for row in some], fields, text_shape(size, bucket))
        waiting.append((some, program(served.params, batch)))
        if len(waiting) > 1:
            yield from _read(*waiting.pop(0))
    for some, made in waiting:
        yield from _read(some, made)


def _read(rows: Sequence[Row], made: Batch) -> Iterator[Scored]:
    loss, correct = (np.asarray(made[name]).tolist() for name in ("loss", "correct"))
    for row, nats, hits in zip(rows, loss, correct, strict=False):
        yield Scored(row.of, int(row.passage.scored.sum()), nats, int(hits))


def _example(passage: Passage) -> dict[str, np.ndarray]:
    return {
        "tokens": passage.tokens,
        "types": np.zeros_like(passage.tokens),
        "targets": passage.targets,
        "scored": passage.scored.astype(np.int32),
    }
