"""Tokens made one after the other with a cache, in one compiled program.

Prompts are padded on the left, so that rows go on together. A row's tokens follow from its own prompt, the settings, and for draws
from (seed, prompt) alone: neighbours and padding are never seen. An encoder-decoder reads its prompts, the sources, with its encoder, once;
its texts begin with one token of their own.

Dims: B rows, S places of sources, P places of prompts, N new tokens, T = P + N, V vocabulary.
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
from jaxtyping import Bool, Int32, PRNGKeyArray, PyTree

from jaxft.config.generation import GenerationConfig
from jaxft.errors import UserError
from jaxft.models.adapters import unadapted
from jaxft.models.caches import Cache, init_cache
from jaxft.models.contract import Model, Output
from jaxft.models.decoding.beams import best_of, search
from jaxft.models.decoding.by_layer import apart
from jaxft.models.decoding.sampling import next_tokens
from jaxft.models.decoding.step import after
from jaxft.models.initial import shapes_and_axes

Array = jax.Array
_SHORTEST = 16


class State(NamedTuple):
    """Texts under way."""

    tokens: Int32[Array, "B T"]
    there: Bool[Array, "B T"]
    """Which places hold a token of the text."""
    at: Int32[Array, ""]
    """The place of the next token."""
    done: Bool[Array, " B"]
    """Rows that have come to an end."""
    keys: PRNGKeyArray
    """[B] for draws."""
    cache: Cache
    """Keys and values of all tokens but the last."""


class Generated(NamedTuple):
    """What was made of each prompt."""

    tokens: list[list[int]]
    """New tokens, without the one that ended the text."""
    ended: list[bool]
    """Whether one did; if not, there were as many as asked for."""


def generate(
    model: Model,
    params: PyTree[Array],
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    seed: int = 0,
) -> Generated:
    """Goes on with prompts.

    Args:
      model: a decoder or an encoder-decoder, with a head for the next token.
      params: its parameters, on one device or spread over a mesh that is set (``jax.set_mesh``).
      prompts: token ids of each, one at least.
      config: how tokens are chosen.
      seed: of the draws.

    Raises:
      UserError: the model makes no texts, or a prompt is empty or too long for it.
    """
    state = begin(model, params, prompts, config, seed=seed)
    params = apart(model, params)
    if config.num_beams > 1:
        return searched(model, config, params, state)
    first = int(state.at)
    return made_of(advance(model, config, params, state, first + config.max_new_tokens), first, config)


@functools.lru_cache(maxsize=16)
def writes(model: Model) -> bool:
    """Whether a model is a decoder of texts that gives each token of its vocabulary a logit."""
    vocabulary, token = model.facts.vocabulary, jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if model.head is None or not model.facts.writes or model.facts.processor != "text":
        return False
    shapes = shapes_and_axes(model)[0]
    logits = jax.eval_shape(lambda params, ids: model.apply({"params": params}, ids).logits, shapes, token)
    return logits is not None and logits.shape == (1, 1, vocabulary)


def begin(
    model: Model,
    params: PyTree[Array],
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    seed: int = 0,
    rows: int | None = None,
    width: int | None = None,
) -> State:
    """Reads prompts, all but their last tokens; see :func:`generate`.

    Args:
      rows: to have so many, the rest of them done; as compiled before, perhaps. None: as many as prompts.
      width: places of prompts, of a decoder; None: :func:`width_of` them.
    """
    if not writes(model):
        raise UserError(
            f"a model with the head {model.head} makes no texts: it needs to be a decoder, or to have one, with a head for the next token"
        )
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt has no tokens; begin with some text")
    rows = len(prompts) if rows is None else rows
    done = np.arange(rows) >= len(prompts)
    numbers = [_number(prompt, seed) for prompt in prompts] + [0] * (rows - len(prompts))
    keys = jax.vmap(jax.random.key)(jnp.array(numbers, jnp.uint32))
    start = start_of(model, config)
    if start is not None:
        sources = _padded(prompts, rows, _width_of_sources(model, prompts, config), left=False)
        begun = _padded([[start]] * rows, rows, 1, room=config.max_new_tokens)
        return _read_sources(model, params, *sources, *begun, done, keys)
    width = width_of(model, prompts, config) if width is None else width
    return _read(model, width, params, *_padded(prompts, rows, width, room=config.max_new_tokens), done, keys)


def start_of(model: Model, config: GenerationConfig) -> int | None:
    """What every text of an encoder-decoder begins with; None: the model is another one."""
    said = config.decoder_start_token_id
    return model.facts.start if said is None or model.facts.start is None else said


def width_of(model: Model, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> int:
    """Places of prompts, of few numbers: programs are compiled for each."""
    longest, limit = max(map(len, prompts)), model.facts.limit
    if limit is not None and longest + config.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={config.max_new_tokens} are beyond the model's limit of {limit} "
            f"positions; {'set max_new_tokens to ' + str(limit - longest) + ' or less' if longest < limit else 'shorten it'}"
        )
    width = max(_SHORTEST, 1 << (longest - 1).bit_length())
    return width if limit is None else min(width, limit - config.max_new_tokens)


def _width_of_sources(model: Model, sources: Sequence[Sequence[int]], config: GenerationConfig) -> int:
    longest, limit = max(map(len, sources)), model.facts.limit
    width = max(_SHORTEST, 1 << (longest - 1).bit_length())
    if limit is None:
        return width
    if longest > limit:
        raise UserError(f"a source of {longest} tokens is beyond the model's limit of {limit} positions; shorten it")
    if config.max_new_tokens >= limit:
        raise UserError(
            f"max_new_tokens={config.max_new_tokens} is beyond the model's limit; set it to {limit - 1} or less"
        )
    return min(width, limit)


def _padded(
    texts: Sequence[Sequence[int]], rows: int, width: int, *, left: bool = True, room: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, width + room], which places hold a token); texts are padded to ``width`` and followed by ``room``."""
    tokens = np.zeros((rows, width + room), np.int32)
    there = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        places = slice(width - len(text), width) if left else slice(len(text))
        tokens[row, places], there[row, places] = text, True
    return tokens, there


def _number(prompt: Sequence[int], seed: int) -> int:
    """The seed of a prompt's draws: whatever stands beside it."""
    hashed = hashlib.sha256(np.array([seed, *prompt], np.int64).tobytes())
    return int.from_bytes(hashed.digest()[:4], "little")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    model: Model, width: int, params: PyTree[Array], tokens: Array, there: Array, done: Array, keys: PRNGKeyArray
) -> State:
    """The state before the first new token. No logits are needed: the head is left out."""
    cache = init_cache(model, tokens.shape[0], tokens.shape[1])
    assert isinstance(model, nn.Module)
    bare = model.clone(head=None)
    body = {name: tree for name, tree in params.items() if name != "head"}
    if width > 1:
        read = bare.apply({"params": body}, tokens[:, : width - 1], there[:, : width - 1], cache=cache)
        cache = cast(Output, read).cache
        assert cache is not None
    return State(tokens, there, jnp.int32(width), done, keys, cache)


@functools.partial(jax.jit, static_argnums=0)
def _read_sources(
    model: Model,
    params: PyTree[Array],
    sources: Array,
    real: Array,
    tokens: Array,
    there: Array,
    done: Array,
    keys: PRNGKeyArray,
) -> State:
    """The state before the first new token: what every layer sees of the sources is computed once."""
    cache = init_cache(model, tokens.shape[0], tokens.shape[1])
    assert isinstance(model, nn.Module)
    bare = model.clone(head=None)
    body = {name: tree for name, tree in params.items() if name != "head"}
    read = bare.apply({"params": body}, sources, real, decoder_tokens=tokens[:, :1], cache=cache)
    made = cast(Output, read).cache
    assert made is not None
    # The first token is read again, with the head.
    cache = dataclasses.replace(cache, memory=made.memory)
    return State(tokens, there, jnp.int32(1), done, keys, cache)


def write(
    model: Model,
    params: PyTree[Array],
    config: GenerationConfig,
    sources: Int32[Array, "B S"],
    real: Bool[Array, "B S"],
) -> Int32[Array, "B N"]:
    """What an encoder-decoder writes of each source, or a decoder after each prompt, -1 behind the end; within a program, of rows that may
    be spread over a mesh.

    Args:
      sources: ids; prompts are padded in front.
      real: which places hold a token.
      config: how tokens are chosen, not drawn. Decoders have no beams here.
    """
    model, params = unadapted(model, params)
    rows, start = sources.shape[0], start_of(model, config)
    if start is None:
        assert config.num_beams == 1
        first, room = sources.shape[1], ((0, 0), (0, config.max_new_tokens))
        keys = jax.random.split(jax.random.key(0), rows)
        begun = _read(model, first, params, jnp.pad(sources, room), jnp.pad(real, room), ~real.any(-1), keys)
        state = advance(model, config, params, begun, first + config.max_new_tokens)
        return jnp.where(state.there, state.tokens, -1)[:, first:]
    width = 1 + config.max_new_tokens
    tokens = jnp.zeros((rows, width), jnp.int32).at[:, 0].set(start)
    there = jnp.zeros((rows, width), bool).at[:, 0].set(True)
    done, keys = ~real.any(-1), jax.random.split(jax.random.key(0), rows)
    state = _read_sources(model, params, sources, real, tokens, there, done, keys)
    if config.num_beams == 1:
        state = advance(model, config, params, state, width)
        return jnp.where(state.there, state.tokens, -1)[:, 1:]
    found = best_of(model, config, params, state.tokens, state.there, state.cache)
    ended = jnp.arange(config.max_new_tokens) < found.best_sizes[:, :1]
    return jnp.where(ended, found.best[:, 0, 1:], -1)


def searched(model: Model, config: GenerationConfig, params: PyTree[Array], state: State) -> Generated:
    """The best texts of a beam search from a fresh state, which is used up."""
    found = search(model, params, config, state.tokens, state.there, state.cache)
    return Generated(found.tokens, found.ended)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def advance(model: Model, config: GenerationConfig, params: PyTree[Array], state: State, until: Array | int) -> State:
    """Makes tokens up to the place ``until``, or until all rows are done. The state that is given is used up.

    Args:
      params: as they are, or :func:`~jaxft.models.decoding.by_layer.apart`.
    """
    first = state.tokens.shape[1] - config.max_new_tokens
    ends = jnp.array(config.eos_token_id or (-1,), jnp.int32)

    def step(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.at - 1, 1, 1)
        seen = jax.lax.dynamic_slice_in_dim(state.there, state.at - 1, 1, 1)
        logits, cache = after(model, params, last, seen, state.cache)
        made = state.at - first
        chosen = next_tokens(logits[:, -1], state.tokens, state.there, made, state.at, state.keys, config)
        chosen = jnp.where(state.done, 0, chosen)
        tokens = jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.at))
        there = jax.lax.dynamic_update_slice(state.there, ~state.done[:, None], (0, state.at))
        done = state.done | (chosen[:, None] == ends).any(-1)
        return State(tokens, there, state.at + 1, done, state.keys, cache)

    return jax.lax.while_loop(lambda state: (state.at < until) & ~state.done.all(), step, state)


def made_of(state: State, first: int, config: GenerationConfig) -> Generated:
    """The new tokens of a state, those from the place ``first`` on."""
    end = int(state.at)
    tokens, there = (np.asarray(part[:, first:end]) for part in (state.tokens, state.there))
    found = [row[real].tolist() for row, real in zip(tokens, there, strict=True)]
    ended = [bool(row) and row[-1] in config.eos_token_id for row in found]
    return Generated([row[:-1] if end else row for row, end in zip(found, ended, strict=True)], ended)
