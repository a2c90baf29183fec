"""Points in order of their mean score over seeds, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxft.reporting.report import mean_sd
from jaxft.training.sweep.ledger import Finished
from jaxft.training.sweep.space import Point

Direction = Literal["max", "min"]


@dataclass(frozen=True)
class Ranked:
    """A point with its scores."""

    number: int
    values: Point
    seeds: tuple[int, ...]
    """The seeds whose trial has a value."""
    scores: tuple[float, ...]
    mean: float
    """NaN: no trial has a value."""
    sd: float | None
    """Sample standard deviation; None: of fewer than two seeds."""
    remark: str
    """Why it is not ranked among the others, or what it lacks; empty: nothing."""


def ranked(
    points: Mapping[int, Point], finished: Sequence[Finished], seeds: Sequence[int], direction: Direction
) -> list[Ranked]:
    """Points with a finished trial, the best first. Those that lack a seed, were pruned or diverged come last: their mean is of
    other trials than that of the rest."""
    found = []
    for number, values in points.items():
        trials = sorted((one for one in finished if one.point == number), key=lambda one: seeds.index(one.seed))
        if trials:
            found.append(_ranked(number, values, trials, len(seeds)))
    sign = -1 if direction == "max" else 1

    def order(one: Ranked) -> tuple[bool, bool, float, float, int]:
        nothing = math.isnan(one.mean)
        return bool(one.remark), nothing, 0.0 if nothing else sign * one.mean, one.sd or 0.0, one.number

    return sorted(found, key=order)


def _ranked(number: int, values: Point, trials: Sequence[Finished], wanted: int) -> Ranked:
    scored = [one for one in trials if one.value is not None]
    scores = tuple(one.value for one in scored if one.value is not None)
    mean, sd = mean_sd(scores) if scores else (math.nan, None)
    states = [one.state for one in trials]
    remark = next((state for state in ("diverged", "pruned") if state in states), "")
    if not remark and len(trials) < wanted:
        remark = f"{len(trials)} of {wanted} seeds"
    if not remark and len(scores) < len(trials):
        remark = "no finite score"
    return Ranked(number, values, tuple(one.seed for one in scored), scores, mean, sd, remark)


def score_text(one: Ranked) -> str:
    """``0.9312 +- 0.0041 (3 seeds)``."""
    if math.isnan(one.mean):
        return "n/a"
    spread = "" if one.sd is None else f" +- {one.sd:.4f}"
    return f"{one.mean:.4f}{spread}"


def table_lines(rows: Sequence[Ranked], metric: str, direction: Direction) -> list[str]:
    """The ranking as a Markdown table, which reads on a console too."""
    keys = list(rows[0].values) if rows else []
    better = "more is better" if direction == "max" else "less is better"
    heads = ["rank", *keys, f"{metric} ({better})", "sd", "seeds", "remark", "point"]
    lines = [heads]
    for rank, one in enumerate(rows, start=1):
        mean = "n/a" if math.isnan(one.mean) else f"{one.mean:.4f}"
        sd = "n/a" if one.sd is None else f"{one.sd:.4f}"
        place = "" if one.remark else str(rank)
        lines.append([place, *one.values.values(), mean, sd, str(len(one.scores)), one.remark, str(one.number)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    rule = ["-" * width for width in widths]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [lines[0], rule, *lines[1:]]
    ]
