"""Which source each row of a run is taken from: exact shares, spread evenly, a pure function of the row's place."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxft.data.corpus.course import Course
from jaxft.errors import UserError

_MOST_PLACES = 1 << 20
"""Places after which shares repeat themselves, at most."""


class Stage(NamedTuple):
    """Shares from one place on."""

    first: int
    shares: tuple[Fraction, ...]
    """They add up to 1."""


@dataclass(frozen=True)
class Mixture:
    """Shares of sources, by stages."""

    stages: tuple[Stage, ...] = ()
    """None: one source after the other, each whole."""

    def said(self) -> list[list[object]]:
        """The stages as plain JSON."""
        return [[stage.first, [str(share) for share in stage.shares]] for stage in self.stages]

    def rows_of(
        self, places: Int64[np.ndarray, " B"], counts: Sequence[int]
    ) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """(source, row of that source) of each place.

        Args:
          places: of rows, in the order that they are read in.
          counts: rows that each source has.
        """
        if not self.stages:
            if len(counts) == 1:
                return np.zeros_like(places), places.copy()
            ends = np.cumsum(counts)
            epoch, within = np.divmod(places, ends[-1])
            source = ends.searchsorted(within, "right")
            return source, within - (ends - counts)[source] + epoch * np.asarray(counts)[source]
        chosen, rows = np.zeros_like(places), np.zeros_like(places)
        for number, stage in enumerate(self.stages):
            last = self.stages[number + 1].first if number + 1 < len(self.stages) else None
            of = places >= stage.first if last is None else (places >= stage.first) & (places < last)
            if of.any():
                table = _table(stage.shares)
                chosen[of], rows[of] = table.at(places[of] - stage.first)
                rows[of] += np.array(self._before(number))[chosen[of]]
        return chosen, rows

    def _before(self, stage: int) -> list[int]:
        """Rows of each source that earlier stages have taken."""
        found = [0] * len(self.stages[0].shares)
        for one, after in zip(self.stages[:stage], self.stages[1 : stage + 1], strict=True):
            found = [a + b for a, b in zip(found, _table(one.shares).taken(after.first - one.first), strict=True)]
        return found

    def taken(self, places: int) -> list[int]:
        """How many of so many first places each source gets."""
        number = max(i for i, stage in enumerate(self.stages) if stage.first <= places)
        more = _table(self.stages[number].shares).taken(places - self.stages[number].first)
        return [a + b for a, b in zip(self._before(number), more, strict=True)]


class _Table(NamedTuple):
    """One period of places."""

    source: np.ndarray
    """[places] which source each is of."""
    before: np.ndarray
    """[places] how many earlier ones of the period are of the same source."""
    counts: np.ndarray
    """[sources] how many of the period each source has."""

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of that source) of places."""
        period, within = np.divmod(places, len(self.source))
        source = self.source[within]
        return source, period * self.counts[source] + self.before[within]

    def taken(self, places: int) -> list[int]:
        """How many of so many first places each source has."""
        period, within = divmod(places, len(self.source))
        return (period * self.counts + np.bincount(self.source[:within], minlength=len(self.counts))).tolist()


@functools.lru_cache(maxsize=64)
def _table(shares: tuple[Fraction, ...]) -> _Table:
    period = np.lcm.reduce([share.denominator for share in shares])
    counts = np.array([int(share * int(period)) for share in shares], np.int64)
    # The j-th of n places of a source is wanted at (j + 1/2) / n of the period.
    wanted = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    source = np.repeat(np.arange(len(counts)), counts)[np.argsort(wanted, kind="stable")]
    before = np.zeros(len(source), np.int64)
    for number, count in enumerate(counts.tolist()):
        before[source == number] = np.arange(count)
    return _Table(source, before, counts)


def make_mixture(stages: Mapping[str, Sequence[float]], sources: int, course: Course, key: str) -> Mixture:
    """A mixture of what a configuration says: weights of the sources, in their order, by the first step that they hold for.

    Args:
      course: how much each step reads.

    Raises:
      UserError: steps or weights that make no sense.
    """
    found = []
    for step, weights in stages.items():
        if not step.isdecimal() or len(step) > 10:
            raise UserError(f"{key}.{step}: must be the first step of a stage, 0 or more")
        if len(weights) != sources:
            raise UserError(
                f"{key}.{step}={list(weights)}: {len(weights)} weights for the {sources} corpora of data.train; give one each"
            )
        if min(weights) < 0 or not sum(weights):
            raise UserError(f"{key}.{step}={list(weights)}: weights must not be negative, and one must be above 0")
        exact = [Fraction(str(weight)) for weight in weights]
        shares = tuple(weight / sum(exact) for weight in exact)
        if np.lcm.reduce([share.denominator for share in shares], dtype=object) > _MOST_PLACES:
            raise UserError(f"{key}.{step}={list(weights)}: give weights of fewer digits: shares are kept exactly")
        found.append(Stage(course.blocks_before(int(step)), shares))
    found.sort()
    if not found or found[0].first:
        raise UserError(f"{key}: no stage begins at step 0; for instance {{0: [0.7, 0.3]}}")
    return Mixture(tuple(found))
