"""Speculative decoding: a smaller model proposes tokens one by one, the model itself reads them all at once and keeps those that it would
have written (Leviathan et al. 2023; Chen et al. 2023).

Greedy texts are those of the model alone, and drawn ones have its distribution, whatever the draft is: a proposal x of the draft's
probabilities q is kept with probability min(1, p(x) / q(x)), else the token is drawn from max(p - q, 0). Every token of a text comes about
so, with draws that follow from (seed, prompt, place) alone. Rows of a batch go on together, as far as the row of which the fewest are
kept; where that cuts the others off depends on no token behind the cut, so that it changes no distribution, and no text.

Dims: B rows, K tokens that are proposed at once, T places, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, PRNGKeyArray, PyTree

from jaxft.config.generation import GenerationConfig
from jaxft.errors import UserError
from jaxft.models.caches import Cache
from jaxft.models.contract import Model
from jaxft.models.decoding.by_layer import apart
from jaxft.models.decoding.decode import Generated, State, begin, made_of, width_of
from jaxft.models.decoding.sampling import allowed, warped
from jaxft.models.decoding.step import after

Array = jax.Array


class Draft(NamedTuple):
    """A smaller model that proposes tokens."""

    model: Model
    params: PyTree[Array]
    tokens: int = 5
    """How many are proposed at once, K."""


class Speculation(NamedTuple):
    """Texts under way."""

    state: State
    draft: Cache
    """What the draft has read: all tokens but the last."""
    rounds: Int32[Array, ""]
    """How often the model has read proposals."""


def generate_with_draft(
    model: Model,
    params: PyTree[Array],
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    seed: int = 0,
) -> Generated:
    """Goes on with prompts as :func:`~jaxft.models.decoding.decode.generate` does, faster where the draft often guesses right.

    Raises:
      UserError: the models do not fit each other, or settings that have no such way.
    """
    begun = begin_with_draft(model, params, draft, prompts, config, seed=seed)
    first = int(begun.state.at)
    until = first + config.max_new_tokens
    made = speculate(model, draft.model, draft.tokens, config, apart(model, params), apart(*draft[:2]), begun, until)
    return made_of(made.state, first, config)


def check_draft(model: Model, draft: Draft, config: GenerationConfig) -> None:
    """Raises UserError if a draft cannot propose tokens for a model."""
    if model.facts.start is not None or draft.model.facts.start is not None:
        raise UserError("a draft proposes tokens of decoders; encoder-decoders write without one")
    if config.num_beams > 1:
        raise UserError(f"num_beams={config.num_beams}: beams are searched without a draft; leave out one of the two")
    ours, theirs = model.facts.vocabulary, draft.model.facts.vocabulary
    if ours != theirs:
        raise UserError(f"the draft has a vocabulary of {theirs} tokens, the model one of {ours}: they need the same")
    if not 1 <= draft.tokens <= _MOST:
        raise UserError(f"draft tokens {draft.tokens}: must be from 1 to {_MOST}")


_MOST = 64


def begin_with_draft(
    model: Model,
    params: PyTree[Array],
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    seed: int = 0,
    rows: int | None = None,
) -> Speculation:
    """The state after both models have read the prompts, all but their last tokens; see :func:`~jaxft.models.decoding.decode.begin`."""
    check_draft(model, draft, config)
    # Proposals may be read up to K places behind the last token that is wanted.
    longer = dataclasses.replace(config, max_new_tokens=config.max_new_tokens + draft.tokens)
    width = min(width_of(one, prompts, longer) for one in (model, draft.model))
    state = begin(model, params, prompts, longer, seed=seed, rows=rows, width=width)
    read = begin(draft.model, draft.params, prompts, longer, seed=seed, rows=rows, width=width)
    return Speculation(state, read.cache, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6)
def speculate(
    model: Model,
    small: Model,
    count: int,
    config: GenerationConfig,
    params: PyTree[Array],
    small_params: PyTree[Array],
    begun: Speculation,
    until: Array | int,
) -> Speculation:
    """Makes tokens up to the place ``until``, or some more, or until all rows are done. What is given is used up.

    Args:
      count: tokens that are proposed at once, K.
      params: as they are, or :func:`~jaxft.models.decoding.by_layer.apart`; those of the small model, too.
    """
    length = begun.state.tokens.shape[1]
    last = length - count
    first = last - config.max_new_tokens
    ends = jnp.array(config.eos_token_id or (-1,), jnp.int32)
    places, ahead = jnp.arange(length), jnp.arange(count)

    def turn(under_way: Speculation) -> Speculation:
        state = under_way.state
        at, live = state.at, jnp.broadcast_to(~state.done[:, None], (len(state.done), count))
        proposed, chances, draft = _proposed(small, small_params, state, under_way.draft, first, count, config)
        read = jnp.concatenate([jax.lax.dynamic_slice_in_dim(state.tokens, at - 1, 1, 1), proposed[:, :-1]], 1)
        seen = jnp.concatenate([jax.lax.dynamic_slice_in_dim(state.there, at - 1, 1, 1), live[:, :-1]], 1)
        logits, cache = after(model, params, read, seen, state.cache)
        tokens = jax.lax.dynamic_update_slice(state.tokens, proposed, (0, at))
        there = jax.lax.dynamic_update_slice(state.there, live, (0, at))

        def scored(logits: Array, step: Array) -> Array:
            before = there & (places < at + step)
            return _scores(logits, tokens, before, at + step - first, at + step, config)

        scores = jax.vmap(scored, in_axes=(1, 0), out_axes=1)(logits, ahead)
        chosen, kept = _judged(scores, proposed, chances, state.keys, at - first, config)
        over = jnp.cumsum((chosen[:, :, None] == ends).any(-1), 1) > 0
        # Of a row, the tokens up to the first that is not the draft's; behind its end, a row goes as far as the others.
        right = jnp.cumprod(kept, 1).sum(1)
        over_there = jnp.take_along_axis(over, jnp.minimum(right, count - 1)[:, None], 1)[:, 0]
        taken = jnp.where(state.done | over_there, count, jnp.minimum(right + 1, count)).min()
        taken = jnp.minimum(taken, last - at)
        real = live & (ahead < taken) & ~jnp.pad(over[:, :-1], ((0, 0), (1, 0)))
        tokens = jax.lax.dynamic_update_slice(state.tokens, jnp.where(real, chosen, 0), (0, at))
        there = jax.lax.dynamic_update_slice(state.there, real, (0, at))
        done = state.done | (over & (ahead < taken)).any(1)
        filled = at + taken - 1
        mask = there & (places < filled)
        cache, draft = (dataclasses.replace(one, mask=mask, filled=filled) for one in (cache, draft))
        return Speculation(State(tokens, there, at + taken, done, state.keys, cache), draft, under_way.rounds + 1)

    end = jnp.minimum(until, last)
    return jax.lax.while_loop(lambda made: (made.state.at < end) & ~made.state.done.all(), turn, begun)


_Reading = tuple[Array, Array, Cache]
"""Tokens, which places hold one, and what has been read of them."""


def _proposed(
    small: Model, params: PyTree[Array], state: State, cache: Cache, first: int, count: int, config: GenerationConfig
) -> tuple[Int32[Array, "B K"], Float[Array, "B K V"] | None, Cache]:
    """What the small model goes on with, by which probabilities it was drawn (None: it was not), and its cache."""

    def step(carried: _Reading, ahead: Array) -> tuple[_Reading, tuple[Array, Array | None]]:
        tokens, there, cache = carried
        at = state.at + ahead
        last, seen = (jax.lax.dynamic_slice_in_dim(one, at - 1, 1, 1) for one in (tokens, there))
        logits, cache = after(small, params, last, seen, cache)
        scores = _scores(logits[:, -1], tokens, there, at - first, at, config)
        drawn = config.do_sample
        chosen = _drawn(state.keys, at - first, 0, scores) if drawn else scores.argmax(-1).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (0, at))
        there = jax.lax.dynamic_update_slice(there, ~state.done[:, None], (0, at))
        return (tokens, there, cache), (chosen, jax.nn.softmax(scores, -1) if drawn else None)

    (_, _, cache), (chosen, chances) = jax.lax.scan(step, (state.tokens, state.there, cache), jnp.arange(count))
    return chosen.T, None if chances is None else chances.swapaxes(0, 1), cache


def _scores(
    logits: Float[Array, "B V"], tokens: Array, there: Array, made: Array, at: Array, config: GenerationConfig
) -> Float[Array, "B V"]:
    scores = allowed(logits.astype(jnp.float32), tokens, there, made, at, config)
    return warped(scores, config) if config.do_sample else scores


def _judged(
    scores: Float[Array, "B K V"],
    proposed: Int32[Array, "B K"],
    chances: Float[Array, "B K V"] | None,
    keys: PRNGKeyArray,
    made: Array,
    config: GenerationConfig,
) -> tuple[Int32[Array, "B K"], Bool[Array, "B K"]]:
    """(the token of each place if all before it were kept, whether that is the proposal's)."""
    if not config.do_sample:
        best = scores.argmax(-1).astype(jnp.int32)
        return best, best == proposed
    assert chances is not None
    wanted = jax.nn.softmax(scores, -1)
    of_proposal = proposed[:, :, None]
    p, q = (jnp.take_along_axis(one, of_proposal, -1)[:, :, 0] for one in (wanted, chances))
    steps = made + jnp.arange(proposed.shape[1])
    uniform = jax.vmap(lambda key: jax.vmap(lambda step: jax.random.uniform(_key(key, step, 1)))(steps))(keys)
    kept = uniform * q < p
    rest = jnp.maximum(wanted - chances, 0)
    # Equal probabilities leave no rest, and every proposal is kept; rounding may still find one that is not.
    rest = jnp.log(jnp.where(rest.sum(-1, keepdims=True) > 0, rest, wanted))
    other = jax.vmap(lambda step, rest: _drawn(keys, step, 2, rest), in_axes=(0, 1), out_axes=1)(steps, rest)
    return jnp.where(kept, proposed, other), kept


def _drawn(keys: PRNGKeyArray, made: Array, which: int, scores: Float[Array, "B V"]) -> Int32[Array, " B"]:
    draw = jax.vmap(lambda key, row: jax.random.categorical(_key(key, made, which), row))
    return draw(keys, scores).astype(jnp.int32)


def _key(key: PRNGKeyArray, made: Array, which: int) -> PRNGKeyArray:
    """The key, made of a row's, of a token's proposal (0), of whether it is kept (1), or of what takes its place (2)."""
    return jax.random.fold_in(jax.random.fold_in(key, made), which)
