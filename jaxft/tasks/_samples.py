"""Texts that show what a decoder writes while it is trained: what follows prompts, and the replies of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.config import LogConfig
from jaxft.config.generation import GenerationConfig
from jaxft.data.processors.continued import Decoding, text_after
from jaxft.data.processors.contract import TextProcessor
from jaxft.errors import UserError
from jaxft.models.contract import Model
from jaxft.models.decoding import write
from jaxft.parallel.sharding import jitted, replicated, ways
from jaxft.tasks.contract import Array, Arrays, Sample, Sampler
from jaxft.trees import Params

_SHORTEST = 16


class Prompt(NamedTuple):
    """What a model goes on with."""

    ids: list[int]
    shown: str
    wanted: str | None = None


def follows(
    prompts: Sequence[Prompt], config: LogConfig, model: Model, mesh: Mesh, tokenizer: TextProcessor
) -> Sampler:
    """What writes, of parameters, the most probable text after each prompt.

    Raises:
      UserError: a prompt is empty, or too long for the model.
    """
    end = tokenizer.special.separator if tokenizer.special.end is None else tokenizer.special.end
    settings = GenerationConfig(max_new_tokens=config.sample_tokens, eos_token_id=() if end is None else (end,))
    tokens, there = _padded(prompts, config, model, mesh)

    def made(params: Params, tokens: Array, there: Array) -> Array:
        return write(model, params, settings, tokens, there)

    program = jitted(made, mesh, replicated(mesh))

    def sampler(params: Params, outputs: Arrays) -> list[Sample]:
        del outputs
        found = np.asarray(jax.device_get(program(params, tokens, there)))[: len(prompts)]
        return [
            Sample(one.shown, text_after(cast(Decoding, tokenizer), one.ids, row[row >= 0].tolist()), one.wanted)
            for one, row in zip(prompts, found, strict=True)
        ]

    return sampler


def _padded(prompts: Sequence[Prompt], config: LogConfig, model: Model, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, P], which places hold a token), padded in front, of as many rows as the mesh splits evenly."""
    longest, limit = max(len(one.ids) for one in prompts), model.facts.limit
    for number, one in enumerate(prompts, 1):
        if not one.ids:
            raise UserError(f"log.prompts: prompt {number} has no tokens; begin with some text")
    if limit is not None and longest + config.sample_tokens > limit:
        raise UserError(
            f"log.sample_tokens={config.sample_tokens}: a prompt of {longest} tokens and as many new ones are beyond the model's limit "
            f"of {limit}; lower it, or shorten the prompt"
        )
    width = max(_SHORTEST, 1 << (longest - 1).bit_length())
    width = width if limit is None else min(width, limit - config.sample_tokens)
    each = ways(mesh, model.compute.rules, "batch")
    tokens = np.zeros((-(-len(prompts) // each) * each, width), np.int32)
    there = np.zeros(tokens.shape, bool)
    for row, one in enumerate(prompts):
        tokens[row, width - len(one.ids) :], there[row, width - len(one.ids) :] = one.ids, True
    return tokens, there
