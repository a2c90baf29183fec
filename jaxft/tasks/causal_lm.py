"""Causal language modelling: each token is predicted from those before it in the same text."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.config import LogConfig, RunConfig
from jaxft.config.tasks.causal_lm import Config
from jaxft.data.corpus.order import uniforms
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.continued import without_ends
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts, Model
from jaxft.tasks._infilling import Infilling, infilling
from jaxft.tasks._passages import stretches_before
from jaxft.tasks._samples import Prompt, follows
from jaxft.tasks._tokens import LONG_TEXTS, PACKING, PROBLEM, TokenTask, columns, encode_all, fields, study
from jaxft.tasks.contract import Array, Batch, Passage, Sampler, Targets

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
    "rewriting",
    "study",
]


ROW_OPTIONS: tuple[str, ...] = ("fill_in_the_middle", "fill_in_the_middle_tokens")


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

    def sampler(
        self, config: LogConfig, model: Model, mesh: Mesh, tokenizer: TextProcessor, rows: Sequence[Sequence[object]]
    ) -> Sampler:
        """What follows prompts."""
        if rows:
            raise UserError(f"log.samples={config.samples}: this task goes on with prompts; give log.prompts instead")
        ends = (tokenizer.special.end, tokenizer.special.separator)
        prompts = [
            Prompt(without_ends(ids, ends), text)
            for text, (ids, _, _) in zip(config.prompts, tokenizer.encode(config.prompts), strict=True)
        ]
        return follows(prompts, config, model, mesh, tokenizer)

    def learnable(self, split: Split) -> int:
        """How many tokens have a token before them in their text."""
        return int(np.maximum(split.sizes("length") - 1, 0).sum())


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each text, which ends with the tokenizer's end token where there is room; some with their middle last.

    Raises:
      UserError: texts are to be filled in, and the tokenizer has no tokens for that, or long texts are split.
    """
    del targets
    encoded = encode_all(rows, tokenizer, config, end_id=tokenizer.special.end)
    # A task of another package that takes this over has options of its own.
    made = infilling(config.task, tokenizer) if isinstance(config.task, Config) else None
    if made is None:
        return encoded
    if config.data.long_texts == "split":
        raise UserError(
            "task.fill_in_the_middle: parts of texts that are split have no room for more tokens; set data.long_texts=truncate, or build "
            "a corpus (jaxft data build)"
        )
    return (_filled(one, made, tokenizer.max_length) for one in encoded)


def _filled(one: Encoded, made: Infilling, limit: int | None) -> Encoded:
    """A text as it is read. What is drawn follows from its tokens: the same wherever it stands, whatever the seed."""
    tokens = one.example["tokens"]
    draws = uniforms((zlib.crc32(tokens.tobytes()),))
    beyond = 0 if limit is None else max(0, len(tokens) + made.room - limit)
    filled = made(tokens[: len(tokens) - beyond], draws)
    if len(filled) == len(tokens) - beyond:  # left as it is
        return one
    example = {"tokens": filled, "types": np.zeros_like(filled)}
    return one._replace(example=example, dropped=one.dropped + beyond)


def rewriting(options: Config, tokenizer: TextProcessor) -> Infilling | None:
    """What becomes of the documents of a corpus when they are read."""
    return infilling(options, tokenizer)


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run."""
    del targets, facts
    return Task(options.z_loss, tokenizer.special.before)
