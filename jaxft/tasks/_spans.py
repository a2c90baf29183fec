"""Stretches of a text that are taken out of it, and put after each other, as T5 is pre-trained (Raffel et al. 2020, section 3.1.4;
``random_spans_noise_mask`` of its code).

Functions are of one row, in a program; arrays have room for the longest. Dims: S tokens, P stretches, T tokens of the target.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int32, PRNGKeyArray

Array = jax.Array


class Room(NamedTuple):
    """How much there can be at most in rows of a length."""

    spans: int
    target: int
    """Tokens that are taken out, what stands for each stretch, and the end."""


def room_of(length: int, density: float, mean: float) -> Room:
    """For rows of so many tokens."""
    noise = max(1, round(length * density))
    spans = max(1, math.ceil(noise / mean))
    return Room(spans, noise + spans + 1)


def noise_of(
    count: Int32[Array, ""], length: int, density: float, mean: float, key: PRNGKeyArray
) -> tuple[Bool[Array, " S"], Int32[Array, " S"], Int32[Array, ""]]:
    """Which of a text's tokens are taken out, the number of the stretch that each is of or behind, and how many stretches there are.

    So many tokens are taken out as ``density`` says, one at least and one less than all, in so many stretches as ``mean`` says. What is
    taken out and what stays alternate, and begin with what stays; lengths are drawn among all that add up. A text of one token stays.

    Args:
      count: tokens of the text.
      length: S.
    """
    spans_most = room_of(length, density, mean).spans
    noise = jnp.clip(jnp.round(count * density), 1, jnp.maximum(count - 1, 1)).astype(jnp.int32)
    spans = jnp.clip(jnp.round(noise / mean), 1, jnp.minimum(noise, jnp.maximum(count - noise, 1))).astype(jnp.int32)
    spans = jnp.where(count > 1, jnp.minimum(spans, spans_most), 0)
    first, second = jax.random.split(key)
    taken = _parts(noise, spans, length, spans_most, first)
    kept = _parts(count - noise, spans, length, spans_most, second)
    ends = jnp.cumsum(kept + taken)
    there = jnp.arange(spans_most) < spans
    marks = jnp.zeros(length + 1, jnp.int32)
    begins = marks.at[ends - taken].add(there, mode="drop")
    inside = jnp.cumsum(begins - marks.at[ends].add(there, mode="drop"))[:length]
    return inside > 0, jnp.cumsum(begins)[:length] - 1, spans


def _parts(total: Array, parts: Array, length: int, most: int, key: PRNGKeyArray) -> Int32[Array, " P"]:
    """``total`` as a sum of ``parts`` numbers of 1 or more, each way alike; the rest of the numbers are 0."""
    places = jnp.arange(length)
    able = (places > 0) & (places < total)
    scores = jnp.where(able, jax.random.uniform(key, (length,)), 2.0)
    begins = (jnp.argsort(jnp.argsort(scores)) < parts - 1) & able
    return jnp.zeros(most, jnp.int32).at[jnp.cumsum(begins)].add((places < total) & (parts > 0), mode="drop")


def corrupted(
    tokens: Int32[Array, " S"],
    text: Bool[Array, " S"],
    real: Bool[Array, " S"],
    noise: Bool[Array, " S"],
    spans: Int32[Array, " S"],
    sentinels: Int32[Array, " P"],
) -> tuple[Int32[Array, " S"], Bool[Array, " S"]]:
    """A row whose stretches are one token each, which says their number, and which places hold a token.

    Args:
      text: which tokens may be taken out.
      real: which places hold a token.
      noise, spans: of the text's tokens, as :func:`noise_of` gives them.
    """
    number = jnp.maximum(jnp.cumsum(text) - 1, 0)
    out, of = noise[number] & text, spans[number]
    begins = out & _first(noise)[number]
    shown = jnp.where(begins, sentinels[jnp.clip(of, 0, len(sentinels) - 1)], tokens)
    stays = real & (~out | begins)
    order = jnp.argsort(~stays, stable=True)
    there = jnp.arange(len(tokens)) < stays.sum()
    return jnp.where(there, shown[order], 0), there


def _first(noise: Array) -> Array:
    """Whether a token is the first of its stretch."""
    return noise & ~jnp.pad(noise[:-1], (1, 0))


def target_of(
    tokens: Int32[Array, " S"],
    text: Bool[Array, " S"],
    noise: Bool[Array, " S"],
    spans: Int32[Array, " S"],
    count: Int32[Array, ""],
    sentinels: Int32[Array, " P"],
    end: int,
    length: int,
) -> tuple[Int32[Array, " T"], Bool[Array, " T"]]:
    """What was taken out: the token of each stretch's number, and its tokens; then the end.

    Args:
      count: stretches.
      length: T.
    """
    number = jnp.maximum(jnp.cumsum(text) - 1, 0)
    out, of = noise[number] & text, spans[number]
    place = jnp.cumsum(out) + of  # tokens taken out before, and the numbers of their stretches and this one
    made = jnp.zeros(length, jnp.int32).at[jnp.where(out, place, length)].set(tokens, mode="drop")
    begins = out & _first(noise)[number]
    named = sentinels[jnp.clip(of, 0, len(sentinels) - 1)]
    made = made.at[jnp.where(begins, place - 1, length)].set(named, mode="drop")
    size = out.sum() + count
    made = made.at[jnp.where(count > 0, size, length)].set(end, mode="drop")
    return made, jnp.arange(length) < jnp.where(count > 0, size + 1, 0)
