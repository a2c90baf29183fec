"""Instruction tuning: conversations, of which the model learns its own replies.

Rows are written by the chat template of the model's folder; the loss is of the tokens of replies alone, those that the template marks, or
each reply and what ends it (:mod:`jaxft.data.processors.replies`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.config import LogConfig, RunConfig
from jaxft.config.tasks.chat import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, chunks_of
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.chat import REPLY, ChatTemplate, check_messages
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.processors.replies import Asked, Replies
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts, Model
from jaxft.tasks import causal_lm
from jaxft.tasks._samples import Prompt, follows
from jaxft.tasks._tokens import PACKING, PROBLEM, ROW_OPTIONS, study
from jaxft.tasks.contract import Array, Batch, LongTexts, Sampler, Targets

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
LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
_REPLIES = "replies"
"""The field that says of each token whether it is of a reply."""


@dataclass(frozen=True)
class Task(causal_lm.Task):
    """What is predicted: the tokens of replies, from all before them. Static and hashable: part of jit cache keys."""

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The same as in causal language modelling, with ``target_weights`` [B, S] 0 where the next token is of no reply."""
        prepared = super().prepare(batch, key)
        following = jnp.pad(batch[_REPLIES][:, 1:], ((0, 0), (0, 1)))
        return prepared | {"target_weights": prepared["target_weights"] * following}

    def sampler(
        self, config: LogConfig, model: Model, mesh: Mesh, tokenizer: TextProcessor, rows: Sequence[Sequence[object]]
    ) -> Sampler:
        """The last reply of conversations, and replies to prompts."""
        template = ChatTemplate(tokenizer.folder)

        def prompt(messages: list[dict[str, str]], wanted: str | None) -> Prompt:
            ((ids, _),) = tokenizer.plain([template.text(messages, reply=True)])
            return Prompt(ids, messages[-1]["content"] if messages else "", wanted)

        asked = [prompt([{"role": "user", "content": text}], None) for text in config.prompts]
        for number, row in enumerate(rows, 1):
            messages = check_messages(row[0], f"held-out row {number}")
            last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == REPLY), None)
            asked.append(prompt(messages[:last], None if last is None else messages[last]["content"]))
        return follows(asked, config, model, mesh, tokenizer)

    def learnable(self, split: Split) -> int:
        """How many tokens are of replies."""
        return int(split.columns[_REPLIES].sum())

    def remarks(self, split: Split) -> Iterator[str]:
        """How many conversations have nothing to learn, and how much of the rest is the model's."""
        own = np.add.reduceat(split.columns[_REPLIES].astype(np.int64), split.offsets["length"][:-1])
        tokens = int(split.sizes("length").sum())
        yield f"{split.name}: {own.sum():,} of {tokens:,} tokens are of replies ({own.sum() / tokens:.1%})"
        if silent := int((own == 0).sum()):
            yield (
                f"warning: {split.name}: {silent:,} of {len(own):,} conversations have no token of a reply within data.max_length, "
                "and teach nothing"
            )


def columns(config: RunConfig) -> tuple[Column, ...]:
    """The column of conversations, each a list of messages."""
    if config.data.text_pair is not None:
        raise UserError(f"data.text_pair={config.data.text_pair}: a conversation is one column; leave it out")
    return (Column(config.data.text, "messages"),)


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each conversation as the chat template writes it, cut at the end if it is too long."""
    del targets, config
    replies = Replies(tokenizer)
    for first, chunk in chunks_of(rows):
        asked = [Asked(None, check_messages(row.values[0], row.where), row.where) for row in chunk]
        for number, one in enumerate(replies.encode(asked), first):
            example = {"tokens": one.ids, "types": np.zeros_like(one.ids), _REPLIES: one.replies}
            yield Encoded(example, number, one.dropped)


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of conversations."""
    del config
    return {**text_fields(pad_id), _REPLIES: Field(("batch", "length"))}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run."""
    del targets, facts
    return Task(options.z_loss, tokenizer.special.before)
