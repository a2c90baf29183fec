"""Transcripts of sound, token by token: a stretch is heard once, its transcript begins with a prompt of tokens, and each token that follows
has a probability.

Dims: B rows, P frames, C bins, T places of a transcript, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, PRNGKeyArray, PyTree

from jaxft.config.generation import GenerationConfig
from jaxft.errors import UserError
from jaxft.models.adapters import unadapted
from jaxft.models.caches import init_cache
from jaxft.models.contract import Model, Output
from jaxft.models.decoding.beams import best_of, search
from jaxft.models.decoding.decode import State, made_of
from jaxft.models.decoding.sampling import allowed, warped
from jaxft.models.decoding.step import after

Array = jax.Array


class Heard(NamedTuple):
    """Stretches of sound whose transcripts are about to be written."""

    state: State
    first: Float32[Array, "B V"]
    """Probabilities of what follows the start of the transcript."""


class Written(NamedTuple):
    """Transcripts of stretches."""

    tokens: list[list[int]]
    """New tokens, without the one that ended it."""
    ended: list[bool]
    """Whether one did."""
    scores: list[float]
    """For each, the mean of its tokens' log-probabilities among those that may follow, the one that ended it among them."""


def writes_speech(model: Model) -> bool:
    """Whether a model writes transcripts of sound."""
    return model.facts.processor == "audio" and model.facts.writes and model.head is not None


def hear(
    model: Model,
    params: PyTree[Array],
    frames: Float[Array | np.ndarray, "B P C"],
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    own: int = 1,
    seed: int = 0,
) -> Heard:
    """Hears stretches, and reads what their transcripts begin with.

    Args:
      prompts: of each, tokens of which the last ``own`` are the transcript's own, those before are what was said before.
      own: the transcript's start and what follows it, of as many tokens in each row.
      seed: of draws; a row's follow from it and from what is heard.

    Raises:
      UserError: the model hears nothing, or prompts leave no room for new tokens.
    """
    if not writes_speech(model):
        raise UserError(f"a model with the head {model.head} writes no transcripts of sound")
    longest, limit = max(map(len, prompts)), model.facts.limit
    if limit is not None and longest + config.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={config.max_new_tokens} are beyond the model's limit of {limit} positions; "
            + (f"set max_new_tokens to {limit - longest} or less" if longest < limit else "shorten the prompt")
        )
    width = longest
    if longest > own:  # what was said before: of few lengths, for programs are compiled for each
        width = own + max(16, 1 << (longest - own - 1).bit_length())
        width = width if limit is None else min(width, limit - config.max_new_tokens)
    tokens = np.zeros((len(prompts), width + config.max_new_tokens), np.int32)
    there = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        places = slice(width - len(prompt), width)
        tokens[row, places], there[row, places] = prompt, True
    numbers = [_number(np.asarray(one), prompt, seed) for one, prompt in zip(frames, prompts, strict=True)]
    keys = jax.vmap(jax.random.key)(jnp.array(numbers, jnp.uint32))
    return _hear(model, width, width - own, params, frames, tokens, there, keys)


def _number(frames: np.ndarray, prompt: Sequence[int], seed: int) -> int:
    hashed = hashlib.sha256(np.array([seed, *prompt], np.int64).tobytes() + np.ascontiguousarray(frames).tobytes())
    return int.from_bytes(hashed.digest()[:4], "little")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _hear(
    model: Model,
    width: int,
    start: int,
    params: PyTree[Array],
    frames: Array,
    tokens: Array,
    there: Array,
    keys: PRNGKeyArray,
) -> Heard:
    """The state before the first new token.

    Args:
      width: places of prompts. start: the place where transcripts begin.
    """
    assert isinstance(model, nn.Module)
    bare = model.clone(head=None)
    body = {name: tree for name, tree in params.items() if name != "head"}
    cache, sound = init_cache(model, tokens.shape[0], tokens.shape[1]), frames

    def read(first: int, last: int, headed: bool = False) -> Output:
        reader, held = (model, params) if headed else (bare, body)
        new = {"decoder_tokens": tokens[:, first:last], "decoder_mask": there[:, first:last]}
        return cast(Output, reader.apply({"params": held}, sound, **new, cache=cache))

    if start > 0:
        known = read(0, start).cache
        assert known is not None
        cache, sound = known, None
    begun = read(start, start + 1, headed=True)
    assert begun.logits is not None
    assert begun.cache is not None
    if start + 1 < width:
        cache, sound = begun.cache, None
        if start + 1 < width - 1:
            known = read(start + 1, width - 1).cache
            assert known is not None
            cache = known
    else:  # the last token of a prompt is read with the first that follows
        cache = dataclasses.replace(cache, memory=begun.cache.memory)
    first = jax.nn.softmax(begun.logits[:, -1].astype(jnp.float32), -1)
    return Heard(State(tokens, there, jnp.int32(width), ~there.any(1), keys, cache), first)


def write(
    model: Model, config: GenerationConfig, params: PyTree[Array], heard: Heard, done: Sequence[bool] = ()
) -> Written:
    """Writes transcripts; what was heard may be written again.

    Args:
      params: as they are, or :func:`~jaxft.models.decoding.by_layer.apart`.
      done: rows that nothing is wanted of.
    """
    state = heard.state
    if done:
        state = state._replace(done=state.done | jnp.asarray(done))
    first = int(state.at)
    if config.num_beams > 1:
        found = search(model, params, config, state.tokens, state.there, state.cache)
        end = config.eos_token_id[0] if config.eos_token_id else 0
        wanted = np.full((len(found.tokens), config.max_new_tokens), end, np.int32)
        for row, text in enumerate(found.tokens):
            wanted[row, : len(text)] = text
        config = dataclasses.replace(config, num_beams=1)
        _, total = _advance(model, config, params, state, jnp.asarray(wanted))
        tokens, ended = found.tokens, found.ended
    else:
        state, total = _advance(model, config, params, state)
        tokens, ended = made_of(state, first, config)
    counts = [max(len(one) + end, 1) for one, end in zip(tokens, ended, strict=True)]
    return Written(tokens, ended, [float(one) / count for one, count in zip(np.asarray(total), counts, strict=True)])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(
    model: Model,
    config: GenerationConfig,
    params: PyTree[Array],
    state: State,
    wanted: Int32[Array, "B N"] | None = None,
) -> tuple[State, Float32[Array, " B"]]:
    """(the state when all rows are done, or have as many tokens as asked for; sums of the new tokens' log-probabilities).

    Args:
      wanted: the tokens, which are scored alone. None: they are chosen.
    """
    length = state.tokens.shape[1]
    first, ends = length - config.max_new_tokens, jnp.array(config.eos_token_id or (-1,), jnp.int32)

    def step(carried: tuple[State, Array]) -> tuple[State, Array]:
        state, total = carried
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.at - 1, 1, 1)
        seen = jax.lax.dynamic_slice_in_dim(state.there, state.at - 1, 1, 1)
        logits, cache = after(model, params, last, seen, state.cache)
        made = state.at - first
        scores = allowed(logits[:, -1].astype(jnp.float32), state.tokens, state.there, made, state.at, config)
        if config.do_sample:
            scores = warped(scores, config)
            draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, made), row))
            chosen, scores = draw(state.keys, scores).astype(jnp.int32), scores * config.temperature
        else:
            chosen = scores.argmax(-1).astype(jnp.int32)
        if wanted is not None:
            chosen = jax.lax.dynamic_slice_in_dim(wanted, made, 1, 1)[:, 0]
        chosen = jnp.where(state.done, 0, chosen)
        told = jnp.take_along_axis(jax.nn.log_softmax(scores, -1), chosen[:, None], 1)[:, 0]
        tokens = jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.at))
        there = jax.lax.dynamic_update_slice(state.there, ~state.done[:, None], (0, state.at))
        done = state.done | (chosen[:, None] == ends).any(-1)
        total += jnp.where(state.done, 0.0, told)
        return State(tokens, there, state.at + 1, done, state.keys, cache), total

    begun = (state, jnp.zeros(len(state.done), jnp.float32))
    return jax.lax.while_loop(lambda carried: (carried[0].at < length) & ~carried[0].done.all(), step, begun)


def transcripts(
    model: Model,
    params: PyTree[Array],
    config: GenerationConfig,
    frames: Float[Array, "B P C"],
    real: Bool[Array, " B"],
    prompt: tuple[int, ...],
) -> Int32[Array, "B N"]:
    """What follows one prompt in the transcript of each stretch, -1 behind the end; within a program, of rows that a mesh may spread.

    Args:
      config: how tokens are chosen, not drawn.
      real: rows that are none that only fill up a batch.
    """
    model, params = unadapted(model, params)
    rows, width = frames.shape[0], len(prompt)
    begun = jnp.broadcast_to(jnp.array(prompt, jnp.int32), (rows, width))
    room = ((0, 0), (0, config.max_new_tokens))
    tokens, there = jnp.pad(begun, room), jnp.pad(jnp.ones((rows, width), bool), room)
    keys = jax.random.split(jax.random.key(0), rows)
    state = _hear(model, width, 0, params, frames, tokens, there, keys).state
    state = state._replace(done=~real)
    if config.num_beams == 1:
        state, _ = _advance(model, config, params, state)
        return jnp.where(state.there, state.tokens, -1)[:, width:]
    found = best_of(model, config, params, state.tokens, state.there & real[:, None], state.cache)
    ended = jnp.arange(config.max_new_tokens) < found.best_sizes[:, :1]
    return jnp.where(ended, found.best[:, 0, width:], -1)
