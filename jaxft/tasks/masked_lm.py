"""Masked language modelling (Devlin et al. 2018): some tokens of a text are hidden, and predicted from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxft.config import RunConfig
from jaxft.config.masking import Masking
from jaxft.config.tasks.masked_lm import Config
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._passages import stretches_around
from jaxft.tasks._tokens import LONG_TEXTS, PACKING, PROBLEM, ROW_OPTIONS, TokenTask, columns, encode_all, fields, study
from jaxft.tasks.contract import Array, Batch, Forward, Passage, Targets

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


@dataclass(frozen=True)
class Task(TokenTask):
    """Which tokens are hidden, and how their prediction is scored. Static and hashable: part of jit cache keys."""

    mask_id: int
    special_ids: tuple[int, ...]
    """Never hidden: start, end and padding tokens."""
    vocab_size: int
    rate: float = 0.15
    """Share of a text's tokens that are predicted, one at least; that of evaluations."""
    continuing: bytes = b""
    """Which ids go on with the word of the token before, a bit for each (:func:`continuing_ids`); empty: tokens are hidden singly."""
    span_words: float = 1.0
    """Words that are hidden together, on average."""
    rates: tuple[tuple[int, float], ...] = ()
    """The rate in training by the step that it holds from, the first is 0; empty: ``rate`` throughout."""
    linear: bool = False
    """Between two of these steps the rate goes from the one to the other in a straight line."""

    head = "masked_lm"
    masked: ClassVar[float] = 0.8
    """Share of the predicted tokens that the mask token stands for."""
    replaced: ClassVar[float] = 0.1
    """Share that a random one stands for; the rest stay as they are."""

    @property
    def schedule(self) -> str:
        """What changes with the step, on one line; empty: nothing does."""
        if not self.rates:
            return ""
        at, between = ("at", " (linear between)") if self.linear else ("from", "")
        stages = ", ".join(f"{rate * 100:.4g} % {at} step {step:,}" for step, rate in self.rates)
        return (
            f"tokens hidden in training: {stages}{between}; of held-out texts: {self.rate * 100:.4g} % (task.mask_rate)"
        )

    def rate_at(self, step: ArrayLike) -> Array:
        """Scalar float32: the rate of a training step, by the number of steps before it."""
        firsts = jnp.asarray([first for first, _ in self.rates or ((0, 0.0),)])
        rates = jnp.asarray([rate for _, rate in self.rates or ((0, self.rate),)], jnp.float32)
        if self.linear:
            return jnp.interp(jnp.asarray(step).astype(jnp.float32), firsts.astype(jnp.float32), rates)
        return rates[jnp.searchsorted(firsts, jnp.asarray(step), side="right") - 1]

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with tokens hidden anew: 80 % as the mask token, 10 % as a random one, 10 % left as they are.

        Which ones follows from ``key`` and the text of the row alone: not from its place in the batch, the padding, the
        devices or the number of micro-batches.

        Adds ``predict`` [B, M] int32 (their positions), ``targets`` [B, M] int32 (what stood there) and
        ``target_weights`` [B, M] float32; M is ``rate`` of the padded length.
        """
        return self._prepared(batch, key, self.rate, self.rate)

    def prepare_at(self, batch: Batch, key: Array, step: ArrayLike) -> Batch:
        """The same for a training step; M is the highest of the ``rates`` of the padded length, whatever the step."""
        if not self.rates:
            return self.prepare(batch, key)
        return self._prepared(batch, key, self.rate_at(step), max(rate for _, rate in self.rates))

    def _prepared(self, batch: Batch, key: Array, rate: ArrayLike, highest: float) -> Batch:
        tokens, (_, s) = batch["tokens"], batch["tokens"].shape
        most = max(1, round(highest * s))
        candidates = self._candidates(batch)
        keys = row_keys(batch, key)
        scores = jax.vmap(lambda k: jax.random.uniform(k, (s,)))(keys)
        words = self._words(batch, candidates) if self.continuing else None
        if words is not None:
            scores = jnp.take_along_axis(scores, self._groups(words, keys), axis=1)
        _, predict = jax.lax.top_k(jnp.where(candidates, scores, -1.0), most)
        chosen = jnp.arange(most) < self._counts(candidates, rate)[:, None]
        if words is not None:
            chosen &= _whole(words, candidates, predict, chosen)

        targets = jnp.take_along_axis(tokens, predict, axis=1)
        fate = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1), (most,)))(keys)
        other = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, 2), (most,), 0, self.vocab_size))(keys)
        shown = jnp.where(
            fate < self.masked, self.mask_id, jnp.where(fate < self.masked + self.replaced, other, targets)
        )
        # top_k gives each position once, so what is not chosen is put back where it was.
        shown = jnp.put_along_axis(tokens, predict, jnp.where(chosen, shown, targets), axis=1, inplace=False)
        weights = chosen * batch["weights"][:, None]
        return batch | {"tokens": shown, "predict": predict, "targets": targets, "target_weights": weights}

    @property
    def turns(self) -> int:
        """How often a document is read until each of its tokens was hidden once, as many at a time as in training."""
        return max(1, round(1 / self.rate))

    def passages(self, tokens: np.ndarray, length: int, stride: int) -> Iterator[Passage]:
        """A document as stretches, each several times, with every so-manieth token hidden: see
        :class:`~jaxft.tasks.contract.Exhaustive`. Special tokens are not scored."""
        seen, turns = np.asarray(tokens, np.int32), self.turns
        for start, stop, first, last in stretches_around(len(seen), length, stride):
            part, places = seen[start:stop], np.arange(start, stop)
            scored = (places >= first) & (places < last) & ~np.isin(part, self.special_ids)
            turn = np.cumsum(scored) % turns
            for number in range(turns):
                if (hidden := scored & (turn == number)).any():
                    yield Passage(np.where(hidden, np.int32(self.mask_id), part), part, hidden)

    def passage_scores(self, forward: Forward, batch: Batch) -> Batch:
        """Sums of each row: see :class:`~jaxft.tasks.contract.Exhaustive`."""
        scored = batch["scored"]
        most = -(-scored.shape[1] // self.turns)
        _, predict = jax.lax.top_k(scored, most)
        here = {name: jnp.take_along_axis(batch[name], predict, axis=1) for name in ("targets", "scored")}
        return super().passage_scores(forward, batch | here | {"predict": predict})

    def learnable(self, split: Split) -> int:
        """How many tokens may be hidden."""
        return int((~np.isin(split.columns["tokens"], self.special_ids)).sum())

    def _candidates(self, batch: Batch) -> Array:
        special = jnp.isin(batch["tokens"], jnp.asarray(self.special_ids, jnp.int32))
        return (batch["mask"] != 0) & ~special

    def _words(self, batch: Batch, candidates: Array) -> Array:
        """[B, S] int32, the how-manieth word of its row each token is of; what is never hidden parts words."""
        bits = np.unpackbits(np.frombuffer(self.continuing, np.uint8))[: self.vocab_size].astype(bool)
        before = jnp.pad(candidates[:, :-1], ((0, 0), (1, 0)))
        if (texts := batch.get("segments")) is not None:
            before &= texts == jnp.pad(texts[:, :-1], ((0, 0), (1, 0)))
        begins = ~(jnp.asarray(bits)[batch["tokens"]] & before)
        return jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1

    def _groups(self, words: Array, keys: Array) -> Array:
        """[B, S] int32, which tokens are hidden together: those of a word, or of some words one after the other."""
        if self.span_words == 1:
            return words
        s = words.shape[1]
        last = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 3), (s,)) < 1 / self.span_words)(keys)
        ended = jnp.pad(jnp.cumsum(last, axis=1, dtype=jnp.int32)[:, :-1], ((0, 0), (1, 0)))
        return jnp.take_along_axis(ended, words, axis=1)

    def _counts(self, candidates: Array, rate: ArrayLike) -> Array:
        """[B] int32: how many tokens of each row are predicted."""
        there = candidates.sum(-1)
        wanted = jnp.maximum(1, jnp.round(rate * there).astype(jnp.int32))
        return jnp.where(there > 0, wanted, 0)


def row_keys(batch: Batch, key: Array) -> Array:
    """[B] keys that follow from ``key`` and the text of each row alone."""
    tokens = batch["tokens"]
    # The sum is the same on any layout; padding counts nothing.
    place = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.uint32)
    text = (jnp.where(batch["mask"] != 0, tokens, 0).astype(jnp.uint32) * place).sum(-1)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(text)


def _whole(words: Array, candidates: Array, predict: Array, chosen: Array) -> Array:
    """[B, M] whether all tokens of a chosen token's word are chosen, or the word is the first one: the last may have been cut."""

    def of_row(words: Array, candidates: Array, predict: Array, chosen: Array) -> Array:
        there = jnp.zeros_like(words).at[words].add(candidates)
        taken = jnp.zeros_like(words).at[words[predict]].add(chosen)
        of = words[predict]
        return (there[of] == taken[of]) | (of == of[0])

    return jax.vmap(of_row)(words, candidates, predict, chosen)


def continuing_ids(tokenizer: TextProcessor) -> bytes:
    """Which ids go on with the word of the token before, a bit for each.

    Raises:
      UserError: the vocabulary does not say where words begin.
    """
    pieces = tokenizer.pieces(np.arange(tokenizer.vocab_size))
    if any(piece.startswith("##") for piece in pieces):  # WordPiece
        found = [piece.startswith("##") for piece in pieces]
    elif mark := next((mark for mark in "\u0120\u2581" if sum(piece.startswith(mark) for piece in pieces) > 1), None):
        found = [
            not piece.startswith(mark) for piece in pieces
        ]  # byte-level and SentencePiece vocabularies mark what begins a word
    else:
        raise UserError(
            f"{tokenizer.folder}: the vocabulary does not say which tokens begin a word; task.mask_units=tokens needs no words"
        )
    return np.packbits(np.array(found)).tobytes()


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
    return Task(*masking_of(options, tokenizer, "masked_lm"))


class MaskingValues(NamedTuple):
    """The first fields of a :class:`Task`, in their order."""

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    rate: float
    continuing: bytes
    span_words: float
    rates: tuple[tuple[int, float], ...]
    linear: bool


def masking_of(options: Masking, tokenizer: TextProcessor, task: str) -> MaskingValues:
    """What options and a tokenizer say of a task that hides tokens.

    Args:
      task: its name, for messages.

    Raises:
      UserError: the tokenizer has no mask token, or its vocabulary does not say where words begin.
    """
    special = tokenizer.special
    if special.mask is None:
        raise UserError(f"{tokenizer.folder}: the tokenizer has no mask token, which {task} needs; set data.tokenizer")
    words = b"" if options.mask_units == "tokens" else continuing_ids(tokenizer)
    span = options.span_words if options.mask_units == "spans" else 1.0
    linear = options.mask_rates_between == "linear"
    sizes = (tokenizer.vocab_size, options.mask_rate)
    return MaskingValues(special.mask, tokenizer.special_ids, *sizes, words, span, options.rates, linear)
