"""From logits to the next token: what is forbidden, what is made less likely, and the draw.

The rules and their order are those of the reference's logits processors (``transformers/generation/logits_process.py``).
Dims: B rows, T places of a row, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, PRNGKeyArray

from jaxft.config.generation import GenerationConfig
from jaxft.config.speech import SpeechGeneration
from jaxft.models.decoding.timestamps import timed

Array = jax.Array
_NEVER = -jnp.inf


def next_tokens(
    logits: Float[Array, "B V"],
    tokens: Int32[Array, "B T"],
    there: Bool[Array, "B T"],
    made: Int32[Array, ""],
    at: Int32[Array, ""],
    keys: PRNGKeyArray,
    config: GenerationConfig,
) -> Int32[Array, " B"]:
    """The token that follows in each row.

    Args:
      logits: of the model, after the last token.
      tokens: of the rows so far.
      there: which places of ``tokens`` hold one.
      made: how many were made.
      at: the place of the next one.
      keys: [B] of the rows; of a row's draws, each takes one of its own by ``made``.
      config: static.
    """
    scores = allowed(logits.astype(jnp.float32), tokens, there, made, at, config)
    if not config.do_sample:
        return scores.argmax(-1).astype(jnp.int32)
    scores = warped(scores, config)
    drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, made), row))(keys, scores)
    return drawn.astype(jnp.int32)


def allowed(
    scores: Float[Array, "B V"],
    tokens: Int32[Array, "B T"],
    there: Bool[Array, "B T"],
    made: Int32[Array, ""],
    at: Int32[Array, ""],
    config: GenerationConfig,
) -> Float[Array, "B V"]:
    """Scores with -inf for tokens that may not follow, and less for those that should not; see :func:`next_tokens`."""
    if config.repetition_penalty != 1:
        scores = _penalised(scores, tokens, there, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        scores = jnp.where(_repeating(tokens, there, at, config.no_repeat_ngram_size, scores.shape[-1]), _NEVER, scores)
    if config.min_new_tokens and config.eos_token_id:
        ends = jnp.zeros(scores.shape[-1], bool).at[jnp.array(config.eos_token_id)].set(True)
        scores = jnp.where(ends & (made < config.min_new_tokens), _NEVER, scores)
    for token, place in ((config.forced_bos_token_id, 0), (config.forced_eos_token_id, config.max_new_tokens - 1)):
        if token is not None:
            alone = jnp.full(scores.shape[-1], _NEVER).at[token].set(0.0)
            scores = jnp.where(made == place, alone, scores)
    begins = 0 if config.forced_bos_token_id is None else 1
    if config.suppress_tokens:
        scores = scores.at[:, jnp.array(config.suppress_tokens)].set(_NEVER)
    if config.begin_suppress_tokens:
        without = scores.at[:, jnp.array(config.begin_suppress_tokens)].set(_NEVER)
        scores = jnp.where(made == begins, without, scores)
    if isinstance(config, SpeechGeneration) and config.timestamps is not None:
        scores = timed(scores, tokens, made, at, config.timestamps)
    return scores


def warped(scores: Float[Array, "B V"], config: GenerationConfig) -> Float[Array, "B V"]:
    """Scores that tokens are drawn by: divided by the temperature, and -inf for tokens that are left out."""
    scores = scores / config.temperature
    if 0 < config.top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, config.top_k)[0][:, -1:]
        scores = jnp.where(scores < least, _NEVER, scores)
    if config.top_p < 1:
        order = jnp.argsort(scores, axis=-1, descending=True)
        ranked = jnp.take_along_axis(jax.nn.softmax(scores, -1), order, -1)
        # Of a token, what those before it have together: the one that passes the share is the last to stay.
        kept = jnp.cumsum(ranked, -1) - ranked < config.top_p
        scores = jnp.where(jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), -1), scores, _NEVER)
    if config.min_p > 0:
        chances = jax.nn.softmax(scores, -1)
        scores = jnp.where(chances < config.min_p * chances.max(-1, keepdims=True), _NEVER, scores)
    return scores


def _penalised(scores: Array, tokens: Array, there: Array, penalty: float) -> Array:
    rows = jnp.arange(len(tokens))[:, None]
    seen = jnp.zeros(scores.shape, bool).at[rows, tokens].max(there)
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def _repeating(tokens: Array, there: Array, at: Array, size: int, vocabulary: int) -> Array:
    """[B, V] which tokens would end a run of ``size`` that the row has already."""
    rows, length = tokens.shape
    places = jnp.arange(length)
    # The last size - 1 tokens against those before every place.
    same = there & (places >= size - 1) & (places < at)
    for back in range(1, size):
        before = jnp.roll(tokens, back, axis=1)
        last = jax.lax.dynamic_slice_in_dim(tokens, at - back, 1, 1)
        same &= (before == last) & jnp.roll(there, back, axis=1)
    whole = jax.lax.dynamic_slice_in_dim(jnp.cumsum(there, 1), at - 1, 1, 1) >= size - 1
    return jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], tokens].max(same & whole)
