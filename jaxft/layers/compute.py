"""How a model is computed, as opposed to what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.sharding import DEFAULT_RULES, AxisRules


@dataclass(frozen=True)
class Compute:
    """How a model is computed, as opposed to what it computes. Static and hashable: part of every jit cache key."""

    activation_dtype: str = "float32"
    matmul_dtype: str = "float32"
    param_dtype: str = "float32"
    layers: Literal["unrolled", "scanned"] = "unrolled"
    remat: Literal["none", "full", "dots", "offload"] = "none"
    vocab_tile: int | None = None
    """Vocabulary entries that a language-modelling loss scores at a time; None: all."""
    rules: AxisRules = DEFAULT_RULES
