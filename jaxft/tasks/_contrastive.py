"""Losses that compare vectors of texts, summed over examples; rows of weight 0 add nothing.

Dims: N examples, P texts of each (a text, its partner, negatives), D width. A text is known by a number; -1: the example has none there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.tasks.contract import Array

_AT_ONCE = 1 << 21
"""Similarities that are held side by side; more are computed in parts, and again in the backward pass."""
_NEVER = -1e30  # a score that counts nothing; minus infinity would make gradients NaN


class Compared(NamedTuple):
    """The texts of a batch."""

    vectors: Array
    """[N, P, D] float32."""
    texts: Array
    """[N, P] int32: equal texts have equal numbers; -1: there is none."""
    weights: Array
    """[N] float32: 0 for examples that only fill up the batch."""


def unit(vectors: Array) -> Array:
    """Vectors of length 1 along the last axis; 0 stays 0. torch's ``normalize`` with its least length of 1e-12."""
    squares = (vectors * vectors).sum(-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def ranking(seen: Compared, scale: float, *, both: bool, mask_duplicates: bool) -> Array:
    """Multiple negatives ranking (Henderson et al. 2017; InfoNCE, van den Oord et al. 2018): the cross-entropy of each example's partner
    among the partners and negatives of all examples, by scaled cosines.

    Args:
      both: half of it, and half the cross-entropy of each partner's text among the texts of all examples.
      mask_duplicates: what is right as well is no negative: a text equal to the partner or to the text itself, and partners of equal
        texts.
    """
    vectors, texts = unit(seen.vectors), seen.texts
    there = (texts[:, 1:] >= 0) & (seen.weights > 0)[:, None]
    partner = jnp.arange(vectors.shape[1] - 1) == 0

    def of_part(own: Array) -> Array:
        """[R] of the examples with these numbers."""
        query, right = texts[own, 0], texts[own, 1]
        itself = own[:, None, None] == jnp.arange(len(texts))[:, None]
        scores = scale * jnp.einsum("rd,npd->rnp", vectors[own, 0], vectors[:, 1:], precision="highest")
        other = texts[None, :, 1:]
        too = (other == right[:, None, None]) | (other == query[:, None, None])
        too |= (texts[None, :, :1] == query[:, None, None]) & partner
        loss = _cross_entropy(scores, itself & partner, there[None] & ~(too & mask_duplicates), (1, 2))
        if not both:
            return loss
        scores = scale * jnp.einsum("rd,nd->rn", vectors[own, 1], vectors[:, 0], precision="highest")
        too = (texts[None, :, 0] == query[:, None]) | (texts[None, :, 0] == right[:, None])
        too |= texts[None, :, 1] == right[:, None]
        back = _cross_entropy(scores, itself[..., 0], (seen.weights > 0)[None] & ~(too & mask_duplicates), (1,))
        return (loss + back) / 2

    losses = _in_parts(of_part, len(texts), len(texts) * (vectors.shape[1] - 1))
    return jnp.where(seen.weights > 0, losses, 0).sum()


def _cross_entropy(scores: Array, right: Array, allowed: Array, axes: tuple[int, ...]) -> Array:
    """[R] of the scores [R, ...] where one is ``right``, among those that are ``allowed``."""
    among = jnp.where(allowed | right, scores, _NEVER)
    return jax.nn.logsumexp(among, axis=axes) - jnp.where(right, scores, 0).sum(axes)


def _in_parts(of_part: Callable[[Array], Array], examples: int, each: int) -> Array:
    """``of_part`` of the numbers of all examples, [N]; of as many at once as hold few similarities, ``each`` per example."""
    parts = next(
        n for n in range(1, examples + 1) if examples % n == 0 and (examples // n) * each <= max(_AT_ONCE, each)
    )
    if parts == 1:
        return of_part(jnp.arange(examples))
    # Part i takes examples i::parts, so that each device keeps the ones it has.
    numbers = jnp.arange(examples).reshape(-1, parts).T
    return jax.lax.map(jax.checkpoint(of_part), numbers).T.reshape(examples)


def cosines(vectors: Array, first: int, second: int) -> Array:
    """[N] float32, of two texts of each example."""
    vectors = unit(vectors)
    return (vectors[:, first] * vectors[:, second]).sum(-1)


def cosent(seen: Compared, numbers: Array, scale: float) -> Array:
    """log(1 + sum of exp(scale (cosine of i - cosine of j))) over all pairs of examples where the number of i is below that of j (CoSENT,
    Su 2022); of the whole batch, no sum over examples."""
    scores, real = scale * cosines(seen.vectors, 0, 1), seen.weights > 0

    def of_part(own: Array) -> Array:
        wrong = (numbers[own, None] < numbers[None]) & real[own, None] & real[None]
        return jax.nn.logsumexp(jnp.where(wrong, scores[own, None] - scores[None], _NEVER), axis=1)

    rows = _in_parts(of_part, len(scores), len(scores))
    return jax.nn.logsumexp(jnp.append(rows, 0.0))


def cosine(seen: Compared, numbers: Array) -> Array:
    """The squared difference of each pair's cosine from its number."""
    return (seen.weights * (cosines(seen.vectors, 0, 1) - numbers) ** 2).sum()


def distillation(seen: Compared, teacher: Array) -> Array:
    """The mean squared difference of each example's vectors from its teacher's (Reimers and Gurevych 2020): a text, and its translation if
    there is one, learn the same.

    Args:
      teacher: [N, D].
    """
    there = (seen.texts >= 0).astype(jnp.float32)
    apart = ((seen.vectors - teacher[:, None]) ** 2).mean(-1)  # [N, P]
    return (seen.weights * (apart * there).sum(-1) / jnp.maximum(there.sum(-1), 1)).sum()


def triplet(seen: Compared, margin: float, *, euclidean: bool) -> Array:
    """max(0, distance to the partner - distance to the negative + margin); Euclidean as torch's ``pairwise_distance``, or 1 - cosine."""
    far = [_distance(seen.vectors, other) if euclidean else 1 - cosines(seen.vectors, 0, other) for other in (1, 2)]
    return (seen.weights * jax.nn.relu(far[0] - far[1] + margin)).sum()


def _distance(vectors: Array, other: int) -> Array:
    apart = vectors[:, 0] - vectors[:, other] + 1e-6  # torch's; keeps the gradient of equal texts finite
    return jnp.sqrt((apart * apart).sum(-1))


def margin_mse(seen: Compared, numbers: Array) -> Array:
    """The squared difference from each example's number of the dot product with the partner less that with the negative (Hofstätter et
    al. 2020): what a cross-encoder says of the two, learnt by vectors."""
    dots = [(seen.vectors[:, 0] * seen.vectors[:, other]).sum(-1) for other in (1, 2)]
    return (seen.weights * (dots[0] - dots[1] - numbers) ** 2).sum()
