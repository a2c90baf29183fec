"""Learning-rate schedules, optimizers, weight-decay masks, freezing, layer-wise rates, clipping, parameter averages.

Names are loaded on first use, so that ``jaxft.training.optim.schedules`` alone (all that ``show-config`` needs) stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxft.training.optim.ema import init_ema, update_ema
    from jaxft.training.optim.freezing import decay_mask, frozen_mask, without_frozen
    from jaxft.training.optim.optimizers import global_norm, make_optimizer, map_state, update_count
    from jaxft.training.optim.schedules import make_schedule, warmup_steps_of

_HOME = {
    "init_ema": "ema",
    "update_ema": "ema",
    "global_norm": "optimizers",
    "make_optimizer": "optimizers",
    "map_state": "optimizers",
    "update_count": "optimizers",
    "decay_mask": "freezing",
    "frozen_mask": "freezing",
    "without_frozen": "freezing",
    "make_schedule": "schedules",
    "warmup_steps_of": "schedules",
}

__all__ = [
    "decay_mask",
    "frozen_mask",
    "global_norm",
    "init_ema",
    "make_optimizer",
    "make_schedule",
    "map_state",
    "update_count",
    "update_ema",
    "warmup_steps_of",
    "without_frozen",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
