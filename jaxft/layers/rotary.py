"""Rotary position embedding (Su et al. 2021), in the half-split form that `transformers` uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Integer

from jaxft.errors import UserError

Array = jax.Array


@dataclass(frozen=True)
class Rotary:
    """Which angles: the base, and how frequencies are changed for texts longer than those of pre-training."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    """``dynamic`` is ``default`` for rows that a model has positions for; longer ones are refused."""
    factor: float = 1.0
    """By how much positions are stretched, in ``linear``, ``yarn`` and ``llama3``."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """The last three are of ``llama3``: short waves stay, long ones are stretched, those between by degrees. ``yarn`` reads the last."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """In ``yarn``, pairs that turn more than ``beta_fast`` times in the original context stay, those that turn less than ``beta_slow``
    times are stretched, those between by degrees."""
    truncate: bool = True
    """The ends of that range are whole pairs."""
    attention_factor: float | None = None
    """What cosines and sines are multiplied with in ``yarn``; None: by ``factor`` (Peng et al. 2023), and by the next two, if both
    are there."""
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.arch: rotary positions: {name}={getattr(self, name)} must be above 0")
        if self.kind == "yarn" and self.theta == 1:
            raise UserError("model.arch: rotary positions of kind 'yarn' need a theta other than 1")

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, head_size: int) -> Float32[np.ndarray, " pairs"]:
        """[H / 2] float32 radians per position."""
        base = 1.0 / self.theta ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
        if self.kind == "linear":
            base = base / self.factor
        elif self.kind == "yarn":
            share = self._stretched(head_size)
            base = share * base / self.factor + (1 - share) * base
        elif self.kind == "llama3":
            waves = self.original_max_position_embeddings * base / (2 * math.pi)  # per original context
            share = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            share = np.clip(share, 0.0, 1.0)
            base = (1 - share) * base / self.factor + share * base
        return base.astype(np.float32)

    def _stretched(self, head_size: int) -> Float[np.ndarray, " pairs"]:
        """How far each pair is stretched in ``yarn``, from 0 to 1."""

        def pair(turns: float) -> float:
            """Which pair turns so often in the original context."""
            return head_size * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / divisor

        divisor = 2 * math.log(self.theta)
        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        high += 0.001 * (low == high)
        return np.clip((np.arange(head_size // 2) - low) / (high - low), 0.0, 1.0)


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
    if rotary.scale != 1.0:
        cos, sin = cos * rotary.scale, sin * rotary.scale
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis).astype(x.dtype)
