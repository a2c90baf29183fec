"""Span corruption, the pre-training of T5 (Raffel et al. 2020): stretches of a text are taken out, each leaves a token that says its
number, and the decoder writes them.

Texts are rows, or a corpus cut into rows (``data.packing=concatenated``); a row is one text here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.span_corruption import Config
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._spans import corrupted, noise_of, room_of, target_of
from jaxft.tasks._tokens import LONG_TEXTS, PROBLEM, ROW_OPTIONS, TokenTask, columns, encode_all, fields, study
from jaxft.tasks.contract import Array, Batch, Targets

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
PACKING = False


@dataclass(frozen=True)
class Task(TokenTask):
    """What is taken out of texts. Static and hashable: part of jit cache keys."""

    density: float
    mean: float
    sentinels: tuple[int, ...]
    """What stands for the first stretch of a text, the second, ..."""
    special_ids: tuple[int, ...]
    """Never taken out."""
    start: int
    """What every target begins with, for the decoder."""
    end: int
    """What every target ends with."""

    head = "seq2seq_lm"

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with stretches taken out anew. Which ones follows from ``key`` and the text of the row alone.

        Adds ``decoder_tokens`` and ``decoder_mask`` [B, T], ``targets`` [B, T] int32 and ``target_weights`` [B, T] float32; T is what rows
        of the padded length can need.

        Raises:
          UserError: rows can have more stretches than the tokenizer has tokens for.
        """
        tokens, real = batch["tokens"], batch["mask"] != 0
        length = tokens.shape[1]
        room = room_of(length, self.density, self.mean)
        if room.spans > len(self.sentinels):
            raise UserError(
                f"rows of {length} tokens can have {room.spans} stretches taken out, and the tokenizer has {len(self.sentinels)} tokens "
                "for them (<extra_id_0>, ...): raise task.mean_span, or lower data.max_length"
            )
        sentinels = jnp.asarray(self.sentinels, jnp.int32)
        text = real & ~jnp.isin(tokens, jnp.asarray(self.special_ids, jnp.int32))
        # The sum is the same on any layout; padding counts nothing.
        place = jnp.arange(1, length + 1, dtype=jnp.uint32)
        number = (jnp.where(real, tokens, 0).astype(jnp.uint32) * place).sum(-1)

        def of_row(tokens: Array, text: Array, real: Array, number: Array) -> tuple[Array, Array, Array, Array]:
            own = jax.random.fold_in(key, number)
            noise, spans, count = noise_of(text.sum(), length, self.density, self.mean, own)
            source, there = corrupted(tokens, text, real, noise, spans, sentinels)
            return source, there, *target_of(tokens, text, noise, spans, count, sentinels, self.end, room.target)

        source, there, targets, written = jax.vmap(of_row)(tokens, text, real, number)
        shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=self.start)
        rest = {name: value for name, value in batch.items() if name not in ("segments", "positions")}
        return rest | {
            "tokens": source,
            "mask": there.astype(jnp.int32),
            "decoder_tokens": shifted,
            "decoder_mask": written.astype(jnp.int32),
            "targets": targets,
            "target_weights": written * batch["weights"][:, None],
        }

    def learnable(self, split: Split) -> int:
        """How many tokens may be taken out."""
        return int((~np.isin(split.columns["tokens"], self.special_ids)).sum())


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each text, with the token that ends it where there is room."""
    del targets
    return encode_all(rows, tokenizer, config, end_id=tokenizer.special.end)


def sentinels_of(tokenizer: TextProcessor) -> tuple[int, ...]:
    """The ids of ``<extra_id_0>``, ``<extra_id_1>``, ... as far as there are such tokens."""
    ids = np.arange(tokenizer.vocab_size)
    named: Mapping[str, int] = {piece: int(one) for piece, one in zip(tokenizer.pieces(ids), ids, strict=True)}
    found: list[int] = []
    while (one := named.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(one)
    return tuple(found)


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: the model has no decoder besides its encoder, or the tokenizer no tokens for stretches or for the end.
    """
    del targets
    if facts.stacks and facts.start is None:
        raise UserError("task.name=span_corruption needs a model with an encoder and a decoder")
    sentinels = sentinels_of(tokenizer) if facts.stacks else (1,)
    if not sentinels:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has no token <extra_id_0>, which stands for what is taken out: jaxft tokenizer train has "
            "--sentinels"
        )
    if tokenizer.special.end is None:
        raise UserError(f"{tokenizer.folder}: the tokenizer has no token that ends texts, which span_corruption needs")
    start = facts.start or 0
    return Task(
        options.noise_density, options.mean_span, sentinels, tokenizer.special_ids, start, tokenizer.special.end
    )
