"""What a family's Config refuses: sizes, rates and names that no model can have, each in one line."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Protocol

from jaxft.errors import UserError, nearest
from jaxft.layers import ACTIVATIONS, RunTimeRate

MOST_LAYERS = 4096
"""Layers of a model: each takes some time, and has a name for each of its tensors, before anything is computed."""
MOST_SIZE = 1 << 24
"""Any other size: above the largest vocabulary, and the longest row."""
MOST_RATE = 1.0 - 2.0**-16
"""The largest rate of dropout: 16 random bits decide what is kept."""
MOST_PARAMETERS = 1 << 42
"""Parameters of a model: above any that has been trained."""


class _Config(Protocol):
    """A Config, as far as every family has its fields."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


def check_layers(count: int) -> None:
    """Raises UserError if there are more layers than any model has, before something is made for each of them."""
    if count > MOST_LAYERS:
        raise UserError(f"config.json: num_hidden_layers={count} must be at most {MOST_LAYERS}")


def check_parameters(count: int) -> None:
    """Raises UserError if sizes, each of which may be, make up more parameters than any model has."""
    if count > MOST_PARAMETERS:
        raise UserError(
            f"model.arch: its sizes make {count:.1e} parameters, at most {MOST_PARAMETERS:.1e} are possible"
        )


def check_rate(name: str, rate: object) -> None:
    """Refuses what is no dropout rate; None is a default, and whoever made a rate that is an argument has checked it.

    Raises:
      UserError: names the field and its value.
    """
    if rate is None or isinstance(rate, RunTimeRate):
        return
    if not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
        raise UserError(f"model.arch: {name}={rate} must lie in 0..1 (1 not included)")
    if rate > MOST_RATE:
        raise UserError(f"model.arch: {name}={rate} must be at most {MOST_RATE:.5f}, or nothing would be left")


def check_fields(
    config: _Config, sizes: tuple[str, ...], rates: tuple[str, ...] = (), activations: tuple[str, ...] = ()
) -> None:
    """Refuses fields out of range; None is a default that the Config knows.

    Args:
      config: with the fields named; ``pad_token_id``, if it has one, must be an id of its ``vocab_size``.
      sizes: fields that must be 1 or more.
      rates: fields of dropout rates.
      activations: fields that name an activation.

    Raises:
      UserError: names the field and its value.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        most = MOST_LAYERS if "layers" in field.name else MOST_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise UserError(f"model.arch: {field.name}={value} must be at most {most}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model.arch: {field.name}={value} must be a finite number")
    for name in sizes:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"model.arch: {name}={getattr(config, name)} must be at least 1")
    padding, tokens = (getattr(config, name, None) for name in ("pad_token_id", "vocab_size"))
    if padding is not None and tokens is not None and not -tokens <= padding < tokens:
        raise UserError(f"model.arch: pad_token_id={padding} is not among {tokens} tokens")
    for name in rates:
        check_rate(name, getattr(config, name))
    for name in activations:
        if getattr(config, name) not in ACTIVATIONS:
            raise UserError(
                f"model.arch.{name}={getattr(config, name)!r}: {nearest(getattr(config, name), ACTIVATIONS)}"
            )
