"""How a model is computed, as opposed to what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.parallel.sharding import DEFAULT_RULES, AxisRules


@dataclass(frozen=True)
class Compute:
    """How a model is computed, as opposed to what it computes. Static and hashable: part of every jit cache key."""

    activation_dtype: str = "float32"
    matmul_dtype: str = "float32"
    param_dtype: str = "float32"
    gradient_dtype: str | None = None
    """Type of weights' gradients as they leave their products and are summed up over devices; None: ``param_dtype``."""
    layers: Literal["unrolled", "scanned"] = "unrolled"
    remat: Literal["none", "full", "dots", "offload"] = "none"
    vocab_tile: int | None = None
    """Vocabulary entries that a language-modelling loss scores at a time; None: all."""
    attention: str = "auto"
    """Backend of :func:`jaxft.attention.attend`, or ``auto``."""
    dropout_bits: Literal["threefry", "hash"] = "hash"
    """Where the random bits of dropout come from (:mod:`jaxft.layers.bits`)."""
    known_ids: bool = False
    """Ids come from rows that were checked against the model's tables (as a run's are): traced look-ups then spend nothing on it."""
    padding_last: bool = False
    """Padding stands behind the tokens of a row, as in every batch that is collated here: kernels that can are then told how
    long rows are, and skip the padding, instead of reading a mask."""
    platform: str | None = None
    """Platform of the devices that compute: ``cpu``, ``gpu`` or ``tpu``; None: jax's default one. Programs for hardware that is not
    there are traced on a CPU: only who makes them knows."""
    device: str | None = None
    """Kind of those devices, as jax names it (``TPU v4``); None: unknown."""
    rules: AxisRules = DEFAULT_RULES
