"""Causal language modelling: each token is predicted from those before it in the same text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.causal_lm import Config
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.models.contract import Facts
from jaxft.tasks._passages import stretches_before
from jaxft.tasks._tokens import LONG_TEXTS, PACKING, PROBLEM, ROW_OPTIONS, TokenTask, columns, encode_all, fields, study
from jaxft.tasks.contract import Array, Batch, Passage, Targets

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
    """What is predicted. Static and hashable: part of jit cache keys."""

    squares: float = 0.0
    before: tuple[int, ...] = ()
    """What a document may begin with that is no text of it: it is seen, never predicted. One that begins with none of these is read after
    the first of them."""

    head = "causal_lm"

    @property
    def z_loss(self) -> float:
        """What is added to a token's loss for each square of the log of the sum of its exponentiated logits."""
        return self.squares

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """Adds ``targets`` [B, S] int32, the next token of each, and ``target_weights`` [B, S] float32: 0 on the last token
        of each text, which has no next, and on padding."""
        del key
        tokens, mask = batch["tokens"], batch["mask"]
        there = batch.get("segments", (mask != 0).astype(jnp.int32))
        following = jnp.pad(there[:, 1:], ((0, 0), (0, 1)))
        weights = ((following == there) & (there != 0)) * batch["weights"][:, None]
        return batch | {"targets": jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))), "target_weights": weights}

    def passages(self, tokens: np.ndarray, length: int, stride: int) -> Iterator[Passage]:
        """A document as stretches: see :class:`~jaxft.tasks.contract.Exhaustive`. Its first token is predicted from what comes before
        documents; where there is no such token, it is not scored."""
        seen = np.asarray(tokens, np.int32)
        if self.before and (not len(seen) or seen[0] not in self.before):
            seen = np.concatenate([np.array(self.before[:1], np.int32), seen])
        for start, stop, first, last in stretches_before(len(seen) - 1, length, stride):
            places = np.arange(start, stop)
            yield Passage(seen[start:stop], seen[start + 1 : stop + 1], (places >= first) & (places < last))

    def learnable(self, split: Split) -> int:
        """How many tokens have a token before them in their text."""
        return int(np.maximum(split.sizes("length") - 1, 0).sum())


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each text, which ends with the tokenizer's end token where there is room."""
    del targets
    return encode_all(rows, tokenizer, config, end_id=tokenizer.special.end)


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run."""
    del targets, facts
    return Task(options.z_loss, tokenizer.special.before)
