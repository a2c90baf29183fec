"""Images of a batch mixed with each other: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

Dims: B images, H height, W width, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

Array = jax.Array


class Mixed(NamedTuple):
    """Images, each mixed with the one that is as far from the end of the batch as it is from its beginning."""

    pixels: Float[Array, "B H W C"]
    share: Float[Array, " B"]
    """How much of each is its own."""


def mixed_images(
    pixels: Float[Array, "B H W C"], weights: Float[Array, " B"], mixup: float, cutmix: float, key: PRNGKeyArray
) -> Mixed:
    """A whole batch mixed in one way: batches are shuffled, so that its mirror image is as good as any other order.

    Args:
      weights: images of weight 0, and those that would be mixed with one, stay as they are.
      mixup, cutmix: alpha of the one and of the other; 0: it is off. Where both are on, each is as probable.
    """
    which, of_share, of_place = jax.random.split(key, 3)
    other, whole = pixels[::-1], ((weights > 0) & (weights[::-1] > 0)).astype(jnp.float32)
    blended, cut = _blended(pixels, other, mixup, of_share), _cut(pixels, other, cutmix, of_share, of_place)
    if blended is None or cut is None:
        found = blended if cut is None else cut
        assert found is not None
        mixed, share = found
    else:
        first = jax.random.bernoulli(which)
        mixed, share = (jnp.where(first, one, two) for one, two in zip(blended, cut, strict=True))
    share = whole * share + (1 - whole)
    return Mixed(jnp.where(whole[:, None, None, None] > 0, mixed, pixels), share)


def _blended(pixels: Array, other: Array, alpha: float, key: PRNGKeyArray) -> tuple[Array, Array] | None:
    if not alpha:
        return None
    share = jax.random.beta(key, alpha, alpha)
    return share * pixels + (1 - share) * other, share


def _cut(
    pixels: Array, other: Array, alpha: float, key: PRNGKeyArray, of_place: PRNGKeyArray
) -> tuple[Array, Array] | None:
    """A rectangle around a random point, as far as it lies in the image; the share is what is left."""
    if not alpha:
        return None
    height, width = pixels.shape[1:3]
    side = jnp.sqrt(1 - jax.random.beta(key, alpha, alpha))
    y, x = jax.random.uniform(of_place, (2,))

    def inside(place: Array, size: int) -> Array:
        half = jnp.floor(size * side) / 2
        middle = jnp.floor(place * size)
        places = jnp.arange(size)
        return (places >= jnp.floor(middle - half)) & (places < jnp.floor(middle + half))

    mask = inside(y, height)[:, None] & inside(x, width)[None, :]
    share = 1 - mask.mean()
    return jnp.where(mask[None, :, :, None], other, pixels), share
