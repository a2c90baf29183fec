"""Optuna as an adviser: points by TPE, trials given up by the median rule. Its study is made anew of the ledger each time it is asked.

Bergstra et al. 2011 (TPE); Golovin et al. 2017 (the median rule). Nothing here imports Optuna before it is used.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from jaxft.errors import UserError
from jaxft.training.sweep.ledger import Finished
from jaxft.training.sweep.ranking import Direction
from jaxft.training.sweep.samples import random_point, refuse_counts
from jaxft.training.sweep.space import Choices, Dimension, Point, Space
from jaxft.training.sweep.trial import Course

_ASKED = 20
"""How often a sampler is asked for a point that was not tried before."""


def import_optuna(why: str) -> ModuleType:
    """The package.

    Args:
      why: what was asked for that needs it.

    Raises:
      UserError: it is not installed.
    """
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise UserError(f"{why} needs the package optuna: pip install 'jaxft[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Optuna:
    """What a study says about points and trials."""

    space: Space
    seed: int
    optuna: Any
    """The package."""

    def point(
        self, number: int, finished: Sequence[Finished], points: Mapping[int, Point], direction: Direction
    ) -> Point:
        """Point number ``number`` by TPE, given what came of those before; one that was tried before is not tried again."""
        tried = [point for other, point in points.items() if other < number]
        for again in range(_ASKED):
            study = self._study(number, again, finished, points, direction)
            trial = study.ask({key: self._distribution(one) for key, one in self.space.dimensions.items()})
            point = {key: _typed(one, trial.params[key]) for key, one in self.space.dimensions.items()}
            if point not in tried:
                return point
        more = (random_point(self.space, self.seed, index) for index in itertools.count(number * _ASKED))
        return next(point for point in more if point not in tried)

    def hopeful(
        self,
        number: int,
        course: Course,
        finished: Sequence[Finished],
        points: Mapping[int, Point],
        direction: Direction,
    ) -> bool:
        """Whether the best value so far is no worse than the median of what earlier points had come to by then."""
        study = self._study(number, 0, finished, points, direction)
        trial = study.ask()
        for place, (_, value) in enumerate(course):
            trial.report(value, place)
        return not trial.should_prune()

    def _study(
        self,
        number: int,
        again: int,
        finished: Sequence[Finished],
        points: Mapping[int, Point],
        direction: Direction,
    ) -> Any:
        """A study of the points before ``number``."""
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{number}/{again}".encode()).digest()[:4], "big")
        study = self.optuna.create_study(
            direction="maximize" if direction == "max" else "minimize",
            sampler=self.optuna.samplers.TPESampler(seed=seed),
            pruner=self.optuna.pruners.MedianPruner(),
        )
        for other in sorted(points):
            trials = [one for one in finished if one.point == other]
            if other < number and trials:
                study.add_trial(self._told(points[other], trials))
        return study

    def _told(self, point: Point, trials: Sequence[Finished]) -> Any:
        """A point as Optuna keeps it: with the mean over its seeds, and the course of the first."""
        values = [one.value for one in trials if one.value is not None]
        states = self.optuna.trial.TrialState
        done = all(one.state == "done" and one.value is not None for one in trials)
        dimensions = self.space.dimensions
        return self.optuna.trial.create_trial(
            state=states.COMPLETE if done else states.PRUNED,  # of what diverged, TPE keeps away as of what was pruned
            value=sum(values) / len(values) if done else None,
            params={key: _number(dimensions[key], text) for key, text in point.items()},
            distributions={key: self._distribution(one) for key, one in dimensions.items()},
            intermediate_values=dict(enumerate(value for _, value in trials[0].course)),
        )

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self.optuna.distributions
        if isinstance(dimension, Choices):
            return kinds.CategoricalDistribution(dimension.texts)
        if dimension.whole:
            return kinds.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def make_optuna(space: Space, seed: int, why: str, count: int | None) -> Optuna:
    """The adviser.

    Args:
      why: what was asked for that needs it.
      count: points that TPE is to try; None: it only prunes.

    Raises:
      UserError: Optuna is not installed, or the space has fewer points.
    """
    if count is not None:
        refuse_counts(space)
        if space.size is not None and count > space.size:
            raise UserError(f"--points {count}: the space has {space.size} points; give at most that, or --search grid")
    return Optuna(space, seed, import_optuna(why))


def _typed(dimension: Dimension, value: object) -> str:
    return str(value) if isinstance(dimension, Choices) else dimension.text(float(str(value)))


def _number(dimension: Dimension, text: str) -> str | int | float:
    if isinstance(dimension, Choices):
        return text
    return int(text) if dimension.whole else float(text)
