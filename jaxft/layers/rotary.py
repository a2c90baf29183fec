"""Rotary position embedding (Su et al. 2021), in the half-split form that `transformers` uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Integer

Array = jax.Array


@dataclass(frozen=True)
class Rotary:
    """Which angles: the base, and how frequencies are changed for texts longer than those of pre-training."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    """By how much positions are stretched, in ``linear`` and ``llama3``."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """The last three are of ``llama3``: short waves stay, long ones are stretched, those between by degrees."""

    def frequencies(self, head_size: int) -> Float32[np.ndarray, " pairs"]:
        """[H / 2] float32 radians per position."""
        base = 1.0 / self.theta ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
        if self.kind == "linear":
            base = base / self.factor
        elif self.kind == "llama3":
            waves = self.original_max_position_embeddings * base / (2 * math.pi)  # per original context
            share = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            share = np.clip(share, 0.0, 1.0)
            base = (1 - share) * base / self.factor + share * base
        return base.astype(np.float32)


def rotate(
    x: Float[Array, "B N S H"] | Float[Array, "N H T"],
    positions: Integer[Array, "#B S"],
    rotary: Rotary,
    tokens_last: bool = False,
) -> Float[Array, "B N S H"] | Float[Array, "N H T"]:
    """``x`` [B, N, S, H], or [N, H, B S] with ``tokens_last``, turned by the angles of ``positions`` [B, S], in float32.

    The result has the type of ``x``.
    """
    size, places = x.shape[1 if tokens_last else 3], positions.astype(jnp.float32)
    frequencies = rotary.frequencies(size)
    angles = frequencies[:, None] * places.reshape(-1) if tokens_last else places[:, None, :, None] * frequencies
    axis, cos, sin = 1 if tokens_last else 3, jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis).astype(x.dtype)
