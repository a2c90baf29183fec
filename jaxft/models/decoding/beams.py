"""Beam search: the texts that are most probable as a whole, as far as a few candidates at every step tell.

Rules, scores and order are those of the reference (``transformers/generation/utils.py``, ``_beam_search``): of all continuations of a
row's beams the best 2 K are looked at (more with several end tokens), the best K of those that go on are the next beams, and those among
the first K that end are kept if their score, divided by length ** length_penalty, is among the K best. A row's texts follow from its own
prompt.

Dims: B rows, K beams, P places of prompts, N new tokens, T = P + N, V vocabulary, C candidates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32, PyTree

from jaxft.config.generation import GenerationConfig
from jaxft.models.caches import Cache
from jaxft.models.contract import Model
from jaxft.models.decoding.sampling import allowed
from jaxft.models.decoding.step import after

Array = jax.Array
_WORST = -1e9
"""The score of what is no candidate: as the reference has it."""


class Beams(NamedTuple):
    """Rows under way."""

    tokens: Int32[Array, "B K T"]
    scores: Float[Array, "B K"]
    """Sums of log-probabilities."""
    at: Int32[Array, ""]
    """The place of the next token."""
    best: Int32[Array, "B K T"]
    """Texts that have ended, the best first."""
    best_scores: Float[Array, "B K"]
    """Divided by length ** length_penalty."""
    best_sizes: Int32[Array, "B K"]
    """New tokens of each, with the one that ended it."""
    ended: Bool[Array, "B K"]
    """Which of them are there."""
    open: Bool[Array, " B"]
    """Rows whose beams may still come to something better."""
    cache: Cache


class Found(NamedTuple):
    """What was found of each prompt."""

    tokens: list[list[int]]
    """New tokens of the best text, without the one that ended it."""
    scores: list[float]
    ended: list[bool]
    """Whether one did; if not, there were as many as asked for."""


def search(
    model: Model,
    params: PyTree[Array],
    config: GenerationConfig,
    tokens: Int32[Array, "B T"],
    there: Bool[Array, "B T"],
    cache: Cache,
) -> Found:
    """The best text of each row.

    Args:
      model: a decoder with a head for the next token.
      params: its parameters, as they are or :func:`~jaxft.models.decoding.by_layer.apart`.
      config: with ``num_beams``; ``do_sample`` is not looked at.
      tokens: prompts, padded on the left, and room for new tokens.
      there: which places hold a token of a prompt.
      cache: of all tokens of the prompts but the last.
    """
    found = best_of(model, config, params, tokens, there, cache)
    first = tokens.shape[1] - config.max_new_tokens
    best, sizes, scores = (np.asarray(part[:, 0]) for part in (found.best, found.best_sizes, found.best_scores))
    made = [row[first : first + size].tolist() for row, size in zip(best, sizes, strict=True)]
    ended = [bool(row) and row[-1] in config.eos_token_id for row in made]
    cut = [row[:-1] if end else row for row, end in zip(made, ended, strict=True)]
    return Found(cut, scores.tolist(), ended)


@functools.partial(jax.jit, static_argnums=(0, 1))
def best_of(
    model: Model, config: GenerationConfig, params: PyTree[Array], tokens: Array, there: Array, cache: Cache
) -> Beams:
    """The beams of each row when it is done; arguments as of :func:`search`."""
    (rows, places), count = tokens.shape, config.num_beams
    seen = jnp.repeat(there, count, 0)
    scores = jnp.full((rows, count), _WORST).at[:, 0].set(0.0)  # all beams are the same at first: one of them counts
    several = jnp.repeat(tokens[:, None], count, 1)
    first = places - config.max_new_tokens
    none = (jnp.full((rows, count), _WORST), jnp.zeros((rows, count), jnp.int32), jnp.zeros((rows, count), bool))
    start = Beams(several, scores, jnp.int32(first), several, *none, there.any(-1), _repeated(cache, count))
    step = functools.partial(_step, model, config, params, seen)

    def goes_on(beams: Beams) -> Array:
        full = beams.ended.all() if config.early_stopping is True else False
        return (beams.at < places) & beams.open.any() & ~jnp.asarray(full)

    return jax.lax.while_loop(goes_on, step, start)


def _step(model: Model, config: GenerationConfig, params: PyTree[Array], seen: Array, beams: Beams) -> Beams:
    (rows, count, places), first = beams.tokens.shape, beams.tokens.shape[2] - config.max_new_tokens
    flat, at = beams.tokens.reshape(rows * count, places), beams.at
    there = seen | ((jnp.arange(places) >= first) & (jnp.arange(places) < at))
    last = jax.lax.dynamic_slice_in_dim(flat, at - 1, 1, 1)
    real = jax.lax.dynamic_slice_in_dim(there, at - 1, 1, 1)
    logits, cache = after(model, params, last, real, beams.cache)
    told = jax.nn.log_softmax(logits[:, -1].astype(jnp.float32), -1)
    told = allowed(told, flat, there, at - first, at, config).reshape(rows, count, -1)
    vocabulary = told.shape[-1]
    whole = (told + beams.scores[..., None]).reshape(rows, -1)
    scores, chosen = jax.lax.top_k(whole, max(2, 1 + len(config.eos_token_id)) * count)
    parents, new = chosen // vocabulary, chosen % vocabulary
    candidates = jnp.take_along_axis(beams.tokens, parents[..., None], 1)
    candidates = jnp.where(jnp.arange(places) == at, new[..., None], candidates)
    ends = (new[..., None] == jnp.array(config.eos_token_id or (-1,))).any(-1) | (at + 1 == places)

    going, kept = jax.lax.top_k(scores + ends * _WORST, count)
    beams = _with_ended(beams, config, candidates, scores, ends, at + 1 - first)
    parent = (jnp.take_along_axis(parents, kept, 1) + count * jnp.arange(rows)[:, None]).reshape(-1)
    beams = beams._replace(
        tokens=jnp.take_along_axis(candidates, kept[..., None], 1),
        scores=going,
        at=at + 1,
        cache=_chosen(cache, parent),
    )
    return beams._replace(open=_may_improve(beams, config, at + 1 - first))


def _with_ended(
    beams: Beams, config: GenerationConfig, candidates: Array, scores: Array, ends: Array, made: Array
) -> Beams:
    """With the candidates that end here, of ``made`` tokens, as far as they are better than those that have ended before."""
    count, numbers = config.num_beams, jnp.arange(scores.shape[1])
    ends = ends & (numbers < count)  # the others are there so that enough go on
    scores = scores / made.astype(jnp.float32) ** config.length_penalty
    if config.early_stopping is True:
        scores += beams.ended.all(-1, keepdims=True) * _WORST
    scores += ~beams.open[:, None] * _WORST + ~ends * _WORST
    sizes = jnp.broadcast_to(made, scores.shape).astype(jnp.int32)
    merged = (
        jnp.concatenate([beams.best, candidates], 1),
        jnp.concatenate([beams.best_sizes, sizes], 1),
        jnp.concatenate([beams.ended, ends], 1),
    )
    best_scores, kept = jax.lax.top_k(jnp.concatenate([beams.best_scores, scores], 1), count)
    best = jnp.take_along_axis(merged[0], kept[..., None], 1)
    sizes, ended = (jnp.take_along_axis(part, kept, 1) for part in merged[1:])
    return beams._replace(best=best, best_scores=best_scores, best_sizes=sizes, ended=ended)


def _may_improve(beams: Beams, config: GenerationConfig, made: Array) -> Bool[Array, " B"]:
    """Whether the best beam of a row could still come to more than the worst text that has ended, as the reference estimates it."""
    longest = config.max_new_tokens if config.early_stopping == "never" and config.length_penalty > 0 else made
    possible = beams.scores[:, 0] / jnp.asarray(longest, jnp.float32) ** config.length_penalty
    worst = jnp.where(beams.ended, beams.best_scores.min(-1, keepdims=True), _WORST)
    return beams.open & (possible[:, None] > worst).any(-1)


def _repeated(cache: Cache, count: int) -> Cache:
    """The cache of rows that are there ``count`` times each, one after the other; they see one memory."""
    keys, values = jnp.repeat(cache.keys, count, 1), jnp.repeat(cache.values, count, 1)
    return dataclasses.replace(cache, keys=keys, values=values, mask=jnp.repeat(cache.mask, count, 0))


def _chosen(cache: Cache, rows: Sequence[int] | Array) -> Cache:
    """The cache of some of its rows, each in the place of one that sees the same memory."""
    return dataclasses.replace(cache, keys=cache.keys[:, rows], values=cache.values[:, rows], mask=cache.mask[rows])
