"""Rates of element dropout among the fields of a Config, by their names: ``dropout`` is part of them.

Such a field goes to :func:`jaxft.layers.dropout`, :func:`jaxft.attention.attend`, or a module that gives it to these. Its value may then
be an argument of a compiled step. Rates at which whole layers are left out (``drop_path_rate``, ``encoder_layerdrop``) are none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxft.layers import Rate
from jaxft.models.contract import C, Model

_MARK = "dropout"


def is_rate(name: str) -> bool:
    """Whether a field of a Config of this name is a rate of dropout."""
    return _MARK in name


def chosen_rates(changes: Mapping[str, object]) -> dict[str, float]:
    """The rates among fields and their values, where they are numbers: None is a default that the Config knows."""
    return {
        name: float(value)
        for name, value in changes.items()
        if is_rate(name) and isinstance(value, int | float) and not isinstance(value, bool)
    }


def with_rates(config: C, rates: Mapping[str, Rate]) -> C:
    """The Config with other rates.

    Raises:
      UserError: one that is out of range.
    """
    return dataclasses.replace(config, **rates)


def model_with_rates(model: Model, rates: Mapping[str, Rate]) -> Model:
    """The model with other rates: the same parameters, the same outputs without a dropout key."""
    return model.clone(config=with_rates(model.config, rates))
