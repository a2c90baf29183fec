"""Options of the tasks that hide tokens and predict them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError

_MOST_DIGITS = 9  # steps are counted in 32 bits


@dataclass(frozen=True)
class Masking(TaskConfig):
    """What is hidden of texts, and predicted."""

    mask_rate: float = 0.15
    """Share of each text's tokens that are predicted; of held-out texts always."""
    mask_rates: dict[str, float] | None = None
    """The share in training, by the step that it holds from: {0: 0.3, 10000: 0.15}. None: ``mask_rate`` throughout."""
    mask_rates_between: Literal["constant", "linear"] = "constant"
    """Between two of those steps, the share stays, or goes from the one to the other in a straight line (Ankner et al. 2024)."""
    mask_units: Literal["tokens", "words", "spans"] = "tokens"
    """What is hidden together: a token, all pieces of a word, or several words one after the other (Joshi et al. 2019)."""
    span_words: float = 3.0
    """Words of a span, on average: each ends one with the same probability."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise UserError(f"task.mask_rate={self.mask_rate}: must lie between 0 and 1")
        if not 1 <= self.span_words <= 100:
            raise UserError(f"task.span_words={self.span_words}: must lie in 1..100")
        if self.mask_rates is not None:
            _check_rates(self.mask_rates)
        elif self.mask_rates_between != "constant":
            raise UserError(
                f"task.mask_rates_between={self.mask_rates_between}: there are no task.mask_rates, for instance {{0: 0.3, 10000: 0.15}}"
            )

    @property
    def rates(self) -> tuple[tuple[int, float], ...]:
        """``mask_rates`` in the order of steps; empty where there are none."""
        return tuple(sorted((int(step), rate) for step, rate in (self.mask_rates or {}).items()))


def _check_rates(rates: Mapping[str, float]) -> None:
    for step, rate in rates.items():
        if not step.isdecimal() or len(step) > _MOST_DIGITS:
            raise UserError(f"task.mask_rates.{step}: must be the step that a share holds from, 0 or more")
        if not 0 < rate < 1:
            raise UserError(f"task.mask_rates.{step}={rate}: must lie between 0 and 1")
    if 0 not in (steps := [int(step) for step in rates]):
        raise UserError("task.mask_rates: says no share for step 0; for instance {0: 0.3, 10000: 0.15}")
    if len(set(steps)) < len(steps):
        raise UserError("task.mask_rates: has a step twice")
