"""The rules of transcripts with times, on logits, as the reference's `WhisperTimeStampLogitsProcessor` has them.

Times come in pairs, the end of one stretch and the beginning of the next; they never decrease; the first token is one; and where times are
more probable together than any other token, a time it is.

Dims: B rows, T places of a row, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from jaxft.config.speech import Timestamps

Array = jax.Array
_NEVER = -jnp.inf


def timed(
    scores: Float[Array, "B V"],
    tokens: Int32[Array, "B T"],
    made: Int32[Array, ""],
    at: Int32[Array, ""],
    rules: Timestamps,
) -> Float[Array, "B V"]:
    """Scores with -inf for tokens that may not follow.

    Args:
      tokens: of the rows so far.
      made: how many were made.
      at: the place of the next one.
    """
    first, ids, places = rules.first, jnp.arange(scores.shape[1]), jnp.arange(tokens.shape[1])
    is_time = tokens >= first
    ours = is_time & (places >= at - made) & (places < at)

    def was_time(back: int, before: bool) -> Array:
        there = jax.lax.dynamic_slice_in_dim(is_time, jnp.maximum(at - back, 0), 1, 1)
        return jnp.where(made >= back, there, before)

    last, second = was_time(1, False), was_time(2, True)
    times = ids >= first
    never = (ids == rules.none) | (last & second & times) | (last & ~second & (ids < rules.end))
    latest = jnp.where(ours, places, -1).max(1, keepdims=True)
    said = jnp.take_along_axis(tokens, jnp.maximum(latest, 0), 1)
    # Of a pair, the second may be the same; any other time is a later one.
    least = jnp.where(latest < 0, first, said + jnp.where(last & ~second, 0, 1))
    never |= times & (ids < least)
    begins = ~times
    if rules.latest_first is not None:
        begins |= ids > first + rules.latest_first
    scores = jnp.where(never | ((made == 0) & begins), _NEVER, scores)
    chances = jax.nn.log_softmax(scores.astype(jnp.float32), -1)
    of_times = jax.nn.logsumexp(jnp.where(times, chances, _NEVER), -1, keepdims=True)
    of_text = jnp.where(times, _NEVER, chances).max(-1, keepdims=True)
    return jnp.where((of_times > of_text) & ~times, _NEVER, scores)
