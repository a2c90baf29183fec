"""What a step of a run on corpora reads: rows that become longer, batches that become larger, by stages.

Corpora are read in blocks, the rows of ``data.max_length`` tokens that a run without stages would have, in the same order. A stage of
shorter rows reads each block as several rows, one after the other; so the tokens of a run, and their order, do not depend on its stages'
lengths, and what has been read before a step is a sum over stages.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxft.config import RunConfig
from jaxft.config.ranges import MOST_ROWS
from jaxft.data.batch import Shape, text_shape
from jaxft.errors import UserError


class Stage(NamedTuple):
    """Batches from one step on."""

    first: int
    blocks: int
    """That a batch reads."""
    parts: int
    """Rows that each block is read as."""


@dataclass(frozen=True)
class Course:
    """The stages of a run, in their order; the first begins at step 0."""

    length: int
    """Tokens of a block."""
    stages: tuple[Stage, ...]

    def at(self, step: int) -> Stage:
        """The stage of a step."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    def blocks_before(self, step: int) -> int:
        """Blocks that steps before this one read."""
        ends = [*(stage.first for stage in self.stages[1:]), step]
        pairs = zip(self.stages, ends, strict=True)
        return sum(max(min(end, step) - stage.first, 0) * stage.blocks for stage, end in pairs)

    def shape(self, stage: Stage) -> Shape:
        """The shape of a stage's batches."""
        return text_shape(stage.blocks * stage.parts, self.length // stage.parts)

    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of all stages, each once."""
        return tuple(dict.fromkeys(self.shape(stage) for stage in self.stages))

    def text(self) -> str:
        """The stages on one line, rows x tokens of each."""
        return ", ".join(f"from step {stage.first:,} {self.shape(stage)}" for stage in self.stages)


def course_of(config: RunConfig) -> Course:
    """What ``data.lengths`` and ``train.batch_ramp`` say.

    Raises:
      UserError: steps, lengths or sizes that make no sense.
    """
    data, train = config.data, config.train
    return _course(
        data.max_length,
        train.batch_size,
        tuple((data.lengths or {"0": data.max_length}).items()),
        tuple((train.batch_ramp or {"0": train.batch_size}).items()),
    )


@functools.lru_cache(maxsize=64)
def _course(length: int, size: int, lengths: tuple[tuple[str, int], ...], ramp: tuple[tuple[str, int], ...]) -> Course:
    by_step = _steps(dict(lengths), "data.lengths", "data.max_length", length)
    sizes = _steps(dict(ramp), "train.batch_ramp", "train.batch_size", size)
    for step, short in by_step.items():
        if length % short:
            raise UserError(
                f"data.lengths.{step}={short}: does not divide data.max_length={length}, whose rows are read in whole parts"
            )
    stages = []
    for first in sorted({*by_step, *sizes}):
        short, blocks = (found[max(step for step in found if step <= first)] for found in (by_step, sizes))
        stages.append(Stage(first, blocks, length // short))
    return Course(length, tuple(stages))


def _steps(said: Mapping[str, int], key: str, last_key: str, last: int) -> dict[int, int]:
    """Numbers by the first step that they hold for, in order."""
    found = {}
    for step, number in said.items():
        if not step.isdecimal() or len(step) > 10:
            raise UserError(f"{key}.{step}: must be the first step of a stage, 0 or more")
        if not 1 <= number <= MOST_ROWS:
            must = "at least 1" if number < 1 else f"at most {MOST_ROWS}"
            raise UserError(f"{key}.{step}={number}: must be {must}")
        found[int(step)] = number
    found = dict(sorted(found.items()))
    if 0 not in found:
        raise UserError(f"{key}: no stage begins at step 0; for instance {{0: {max(last // 4, 1)}, 1000: {last}}}")
    if (final := found[max(found)]) != last:
        raise UserError(f"{key}: its last stage has {final}, and {last_key}={last}; make them equal")
    return found
