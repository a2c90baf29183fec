"""How probable replies are under a model: log-probabilities summed over their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxft.data.batch import Field, collate, text_fields, text_shape
from jaxft.data.loader import bucket_of, make_buckets
from jaxft.data.processors.replies import Asked, Replies
from jaxft.errors import UserError
from jaxft.inference.predict import Served
from jaxft.models.decoding import writes
from jaxft.tasks._replies import REPLIES, next_tokens, reply_logps, reply_tokens
from jaxft.tasks.contract import Batch
from jaxft.training.step import forward_of
from jaxft.trees import Params


class Score(NamedTuple):
    """What a model says of a reply."""

    logp: float
    """Its log-probability in nats, given all before, summed over its tokens; NaN: the model has none."""
    tokens: int
    """How many these are."""
    dropped: int
    """Tokens that were cut off at the end, of the prompt with its reply."""


def make_scorer(served: Served, batch_size: int) -> Callable[[Sequence[Asked]], list[Score]]:
    """``prompts with their replies -> scores``, in the same order; those of similar length are computed together.

    Raises:
      UserError: the model has no head for the next token, or batches cannot be split over the devices asked for.
    """
    if not writes(served.model):
        raise UserError(
            f"the model has the head {served.model.head}, which scores no texts: that needs a decoder, with a head for the next token"
        )
    served.devices.check_batch("--batch-size", batch_size)
    tokenizer, ways = served.tokenizer, served.devices.batch_ways
    replies, buckets = Replies(tokenizer), make_buckets(None, tokenizer.max_length or 512)
    fields = {**text_fields(tokenizer.pad_id), REPLIES: Field(("batch", "length"))}

    def computed(params: Params, batch: Batch) -> Batch:
        logps = reply_logps(forward_of(served.model, params), next_tokens(batch), None, 1)
        return {"logps": logps[:, 0], "tokens": reply_tokens(batch, 1)[:, 0]}

    program = served.devices.compiled(computed, fields)

    def scores(asked: Sequence[Asked]) -> list[Score]:
        encoded = replies.encode(asked)
        order, found = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids)), dict[int, Score]()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            size = min(batch_size, -(-(1 << (len(chosen) - 1).bit_length()) // ways) * ways)
            shape = text_shape(size, bucket_of(max(1, len(encoded[chosen[-1]].ids)), buckets))
            rows = [
                {"tokens": one.ids, "types": np.zeros_like(one.ids), REPLIES: one.replies}
                for one in map(encoded.__getitem__, chosen)
            ]
            made = jax.device_get(program(served.params, collate(rows, fields, shape)))
            for place, i in enumerate(chosen):
                counted = int(np.rint(made["tokens"][place]))
                found[i] = Score(float(made["logps"][place]), counted, encoded[i].dropped)
        return [found[i] for i in range(len(encoded))]

    return scores
