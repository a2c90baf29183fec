"""Masked language modelling of pairs of texts, and whether the second one follows the first: the pre-training of BERT (next sentence
prediction: Devlin et al. 2018) and of ALBERT (sentence order prediction: Lan et al. 2020).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxft.config import RunConfig
from jaxft.config.tasks.sentence_pairs import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.corpus.order import uniforms
from jaxft.data.corpus.pairs import FRAME, LEAST, SHORTEST, Pairing, pieces_of
from jaxft.data.encode import chunks_of
from jaxft.data.examples import Encoded
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks import masked_lm
from jaxft.tasks._tokens import PROBLEM, ROW_OPTIONS, columns, study, token_cross_entropy
from jaxft.tasks.contract import Array, Arrays, Batch, Direction, Forward, LongTexts, Output, Sums, Targets

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
    "pairing",
    "study",
]
LONG_TEXTS: tuple[LongTexts, ...] = ("split",)
PACKING = False
_ENDS = {".", "!", "?", "...", "\u2026", "\u3002", "\uff01", "\uff1f"}
"""Tokens that end sentences."""
_MARKS = "\u0120\u2581"
"""What byte-level and SentencePiece vocabularies begin words with."""


@dataclass(frozen=True)
class Task(masked_lm.Task):
    """Which tokens are hidden, and how they and pairs are scored. Static and hashable: part of jit cache keys."""

    sentences: str = "next"

    head = "pretraining"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        of_words: dict[str, Direction] = {"masked_lm_loss": "min", "perplexity": "min", "accuracy": "max"}
        return {"loss": "min", **of_words, f"{self._pairs}_loss": "min", f"{self._pairs}_accuracy": "max"}

    @property
    def _pairs(self) -> str:
        """What metrics of pairs begin with."""
        return "next_sentence" if self.sentences == "next" else "sentence_order"

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with tokens hidden (:meth:`jaxft.tasks.masked_lm.Task.prepare`).

        Adds ``balance`` [B] float32, predicted tokens of the batch for each of its pairs.
        """
        return _balanced(super().prepare(batch, key))

    def prepare_at(self, batch: Batch, key: Array, step: ArrayLike) -> Batch:
        """The same for a training step: see :class:`~jaxft.tasks.contract.Scheduled`."""
        return _balanced(super().prepare_at(batch, key, step))

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss`` and ``weight`` of both together, and of each its loss and what it got right."""
        seen: list[Output] = []

        def kept(batch: Batch, key: Array | None) -> Output:
            seen.append(forward(batch, key))
            return seen[-1]

        words = super().sums(kept, batch, key)
        answers, weights = seen[0].row_logits, batch["weights"]
        assert answers is not None  # models with this head give both
        pairs = token_cross_entropy(answers, batch["labels"]) * weights
        return {
            **words,
            "loss": words["loss"] + (pairs * batch["balance"]).sum(),
            "masked_lm": words["loss"],
            "pairs": pairs.sum(),
            "right": ((answers.argmax(-1) == batch["labels"]) * weights).sum(),
        }

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, float]:
        """The sum of both mean losses in nats; perplexity and accuracy of hidden tokens; loss and accuracy of pairs. NaN of nothing."""
        words = super().score({**sums, "loss": sums["masked_lm"]}, outputs)
        pairs = float(sums["rows"]) or math.nan
        loss, right = float(sums["pairs"]) / pairs, float(sums["right"]) / pairs
        return {
            **words,
            "loss": words["loss"] + loss,
            "masked_lm_loss": words["loss"],
            f"{self._pairs}_loss": loss,
            f"{self._pairs}_accuracy": right,
        }


def _balanced(batch: Batch) -> Batch:
    # The step divides once, by the predicted tokens of the whole batch; the loss of pairs is a mean over rows.
    weights = batch["weights"]
    balance = batch["target_weights"].sum() / jnp.maximum(weights.sum(), 1e-30)
    return batch | {"balance": jnp.broadcast_to(balance, weights.shape)}


def pairing(options: Config, tokenizer: TextProcessor) -> Pairing:
    """How texts become pairs.

    Raises:
      UserError: the tokenizer has no token that begins rows, or none that stands behind texts.
    """
    special = tokenizer.special
    if special.first is None or special.separator is None:
        lacking = "cls_token" if special.first is None else "sep_token"
        raise UserError(
            f"{tokenizer.folder}: the tokenizer names no {lacking}, which rows of two texts need; set data.tokenizer"
        )
    return Pairing(options.sentences, special.first, special.separator, *_bits(tokenizer))


@functools.lru_cache(maxsize=4)
def _bits(tokenizer: TextProcessor) -> tuple[bytes, bytes]:
    """Which ids end a sentence, and which begin a word, a bit for each."""
    pieces = tokenizer.pieces(np.arange(tokenizer.vocab_size))
    ends = [piece.lstrip(_MARKS).removeprefix("##") in _ENDS for piece in pieces]
    marked = any(piece.startswith("##") for piece in pieces)
    begins = [not piece.startswith("##") if marked else piece.startswith(tuple(_MARKS)) for piece in pieces]
    first, second = (np.packbits(np.array(bits)).tobytes() for bits in (ends, begins))
    return first, second


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of pairs."""
    del config
    return {**text_fields(pad_id), "labels": Field(("batch",))}


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each text as its pairs. What is drawn follows from a text and its place alone, and other documents are rows near it.

    Raises:
      UserError: rows of two texts, or no other text to take from.
    """
    del targets
    assert isinstance(config.task, Config)
    if config.data.text_pair is not None:
        raise UserError("data.text_pair: pairs are made of the parts of one text; leave it out")
    made, room, before = pairing(config.task, tokenizer), config.data.max_length - FRAME, list[np.ndarray]()
    if config.data.max_length < SHORTEST:
        raise UserError(f"data.max_length={config.data.max_length}: rows of two texts need {SHORTEST} tokens at least")
    where, found = "", 0
    for first, chunk in chunks_of(rows):
        texts = [np.asarray(ids, np.int32) for ids, _ in tokenizer.plain([str(row.values[0]) for row in chunk])]
        pool = [text for text in (*before, *texts) if pieces_of(len(text), room)]
        place = sum(pieces_of(len(text), room) > 0 for text in before)
        for number, text in enumerate(texts):
            if pieces_of(len(text), room):
                yield from _pairs_of(pool, place, first + number, made, room, chunk[number].where)
                place += 1
        where, found, before = chunk[-1].where, found + place, texts
    if not found:
        raise UserError(f"{where}: neither this text nor one before it has {2 * LEAST} tokens, which two texts need")


def _pairs_of(
    pool: Sequence[np.ndarray], place: int, row: int, made: Pairing, room: int, where: str
) -> Iterator[Encoded]:
    """The pairs of one of some texts."""
    text = pool[place]
    if made.kind == "next" and len(pool) == 1:
        raise UserError(f"{where}: there is no other text near it that is long enough; task.sentences=order needs none")

    def piece(text: np.ndarray, number: int) -> np.ndarray:
        return made.piece(lambda first, last: text[first:last], len(text), number, room)

    def other(draw: float) -> np.ndarray:
        chosen = draw * (len(pool) - 1)
        found = pool[int(chosen) + (int(chosen) >= place)]
        return piece(found, int(chosen % 1 * pieces_of(len(found), room)))

    of_text = int((text.astype(np.int64) * np.arange(1, len(text) + 1)).sum())
    for number in range(pieces_of(len(text), room)):
        pair = made.pair(piece(text, number), room, uniforms((row, number, of_text)), other)
        example = {"tokens": pair.tokens, "types": pair.types, "labels": np.asarray(pair.label, np.int32)}
        yield Encoded(example, row, 0)


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: the tokenizer has no mask token.
    """
    del targets, facts
    return Task(*masked_lm.masking_of(options, tokenizer, "sentence_pairs"), options.sentences)
