"""What a family's Config refuses: sizes, rates and names that no model can have, each in one line."""

from __future__ import annotations

from typing import Protocol

from jaxft.errors import UserError, nearest
from jaxft.layers import ACTIVATIONS


class _Tokens(Protocol):
    """A Config, as far as every family has its fields."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_token_id(self) -> int | None: ...


def check_fields(
    config: _Tokens, sizes: tuple[str, ...], rates: tuple[str, ...] = (), activations: tuple[str, ...] = ()
) -> None:
    """Refuses fields out of range; None is a default that the Config knows.

    Args:
      config: with fields ``vocab_size`` and ``pad_token_id`` besides those named.
      sizes: fields that must be 1 or more.
      rates: fields of dropout rates.
      activations: fields that name an activation.

    Raises:
      UserError: names the field and its value.
    """
    for name in sizes:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"model.arch: {name}={getattr(config, name)} must be at least 1")
    if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
        raise UserError(f"model.arch: pad_token_id={config.pad_token_id} is not among {config.vocab_size} tokens")
    for name in rates:
        if not 0.0 <= (getattr(config, name) or 0.0) < 1.0:
            raise UserError(f"model.arch: {name}={getattr(config, name)} must lie in 0..1")
    for name in activations:
        if getattr(config, name) not in ACTIVATIONS:
            raise UserError(
                f"model.arch.{name}={getattr(config, name)!r}: {nearest(getattr(config, name), ACTIVATIONS)}"
            )
