"""The space of a sweep, as it is typed: ``key=a,b,c``, ``key=0..4``, ``key=1e-5..1e-3:log``; what has one value is fixed.

A point of the space is what would be typed for ``jaxft train``: text by key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxft.config.read import kind_of
from jaxft.config.scalars import members, takes_text
from jaxft.config.typed import items_of
from jaxft.errors import UserError

SEED = "train.seed"
Point = Mapping[str, str]
"""The value of each key, as it is typed."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?:[ :](log))?(?::(\d+))?")
_DIGITS = 4
"""Significant digits of numbers that a search makes: what is shown is what is used."""
MOST_POINTS = 100_000
"""Points of a grid, and seeds of each: more than can be run."""
_FORM = "write LOW..HIGH, LOW..HIGH:log, or with a number of grid points LOW..HIGH:log:5"
_OWN = {
    "train.out": "trials lie in the sweep's folder (--out)",
    "train.seeds": "write train.seed=0..4",
    "eval.metric": "one metric ranks all; give one",
    "task.name": "scores of two tasks cannot be compared; give one",
    "train.export": "trials export nothing; train the winner's run file for that",
}


@dataclass(frozen=True)
class Choices:
    """A few values."""

    texts: tuple[str, ...]

    @property
    def size(self) -> int | None:
        """How many values it has."""
        return len(self.texts)

    def grid(self, key: str) -> tuple[str, ...]:
        """The values of a grid."""
        del key
        return self.texts

    def at(self, share: float) -> str:
        """The value at a share of the way, 0 to below 1."""
        return self.texts[int(share * len(self.texts))]


@dataclass(frozen=True)
class Range:
    """Numbers between two, both included."""

    low: float
    high: float
    log: bool
    count: int | None
    whole: bool

    @property
    def size(self) -> int | None:
        """How many values it has, if that is a number."""
        return int(self.high) - int(self.low) + 1 if self.whole else None

    def grid(self, key: str) -> tuple[str, ...]:
        """The values of a grid.

        Raises:
          UserError: nothing says how many.
        """
        if self.count is None and not (self.whole and not self.log):
            tail = ":log" if self.log else ":lin"
            shown = f"{key}={_text(self.low, self.whole)}..{_text(self.high, self.whole)}"
            form = f"{shown}{tail}:5" if self.log else f"{shown}:5"
            raise UserError(f"{shown}: a grid needs to know how many values: write {form}, or use --search random")
        if self.count is None:
            return tuple(map(str, range(int(self.low), int(self.high) + 1)))
        made = [self._between(i / max(self.count - 1, 1)) for i in range(self.count)]
        return tuple(dict.fromkeys(made))

    def at(self, share: float) -> str:
        """The value at a share of the way, 0 to below 1."""
        if not self.whole:
            return self._between(share)
        if self.log:  # each whole number has the stretch from half below to half above
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return str(min(max(round(math.exp(low + share * (high - low))), int(self.low)), int(self.high)))
        return str(int(self.low) + int(share * (int(self.high) - int(self.low) + 1)))

    def _between(self, share: float) -> str:
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return self.text(value)

    def text(self, value: float) -> str:
        """A number of the range in a few digits; rounding does not leave the range."""
        made = _text(value, self.whole)
        return made if self.low <= float(made) <= self.high else repr(self.low if float(made) < self.low else self.high)


Dimension = Choices | Range


@dataclass(frozen=True)
class Space:
    """What a sweep goes over."""

    dimensions: Mapping[str, Dimension]
    """By key, but for the seeds."""
    seeds: tuple[int, ...]
    """Each point is run with each of them. Empty: with the run file's alone."""
    fixed: tuple[str, ...]
    """``key=value`` of what is the same for all."""
    typed: Mapping[str, str]
    """The dimensions, seeds too, as they were typed."""

    def grid(self) -> list[Point]:
        """Every point of a grid, the last key changing fastest.

        Raises:
          UserError: a range that does not say how many values it has, or more points than can be run.
        """
        count = math.prod(one.size or getattr(one, "count", None) or 1 for one in self.dimensions.values())
        _refuse_more(count, f"a grid of {', '.join(self.dimensions)}: {count} points", "use --search random")
        points: list[dict[str, str]] = [{}]
        for key, dimension in self.dimensions.items():
            points = [{**point, key: text} for point in points for text in dimension.grid(key)]
        return list(points)

    @property
    def size(self) -> int | None:
        """How many points it has; None: no number, for some key takes any number of a range."""
        sizes = [one.size for one in self.dimensions.values()]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)


def parse_space(assignments: Sequence[str], task: str) -> Space:
    """The space that ``key=value`` arguments say.

    Args:
      task: ``task.name`` of the run file, whose options may be keys.

    Raises:
      UserError: an unknown key, an empty or upside-down range, a value given twice, nothing that varies.
    """
    dimensions: dict[str, Dimension] = {}
    typed: dict[str, str] = {}
    fixed: list[str] = []
    seeds: tuple[int, ...] = ()
    keys: list[str] = []
    for assignment in sorted(assignments, key=lambda text: not text.startswith("task.name=")):
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"{assignment!r}: expected key=value, for instance optim.learning_rate=1e-5,3e-5")
        if key in keys:
            raise UserError(f"{key} is given twice; write {key}=A,B")
        keys.append(key)
        found = _dimension(key, text, kind_of(key, text, task))
        if key == "task.name" and found is None:
            task = text
        if key in _OWN and (found is not None or key == "train.seeds"):
            raise UserError(f"{assignment}: {_OWN[key]}")
        if found is None:
            fixed.append(assignment)
            continue
        typed[key] = text
        if key == SEED:
            _refuse_more(found.size or 0, f"{assignment}: {found.size} seeds", "take fewer")
            seeds = tuple(map(int, found.grid(key)))
        else:
            dimensions[key] = found
    if not typed:
        raise UserError("nothing varies: give some key several values, for instance optim.learning_rate=1e-5,3e-5,1e-4")
    return Space(dimensions, seeds, tuple(fixed), typed)


def _dimension(key: str, text: str, kind: object) -> Dimension | None:
    """The dimension that a text says; None: it is one value."""
    numbers = not takes_text(kind)
    if numbers and (match := _RANGE.fullmatch(text)):
        return _range(key, text, match, kind)
    if "," not in text and not (numbers and ".." in text):
        return None
    parts = items_of(text, f"{key}={text}", "[]{}")
    if numbers and any(".." in part for part in parts if not part.startswith(("[", "{"))):
        raise UserError(f"{key}={text}: is no range; {_FORM}")
    if len(parts) < 2:
        return None
    twice = next((part for part in parts if parts.count(part) > 1), None)
    if twice is not None:
        raise UserError(f"{key}={text}: has {twice} twice")
    if key == SEED and not all(part.isdecimal() for part in parts):
        raise UserError(f"{key}={text}: seeds are whole numbers")
    return Choices(tuple(parts))


def _range(key: str, text: str, match: re.Match[str], kind: object) -> Range:
    first, last, log, count = match.groups()
    low, high = float(first), float(last)
    allowed: tuple[object, ...] = members(kind)
    whole = not any(one is float for one in allowed) and all(re.fullmatch(r"[-+]?\d+", end) for end in (first, last))
    if int in allowed and float not in allowed and not whole:
        raise UserError(f"{key}={text}: takes whole numbers")
    if low >= high:
        raise UserError(f"{key}={text}: is empty: {first} is not below {last}")
    if log and low <= 0:
        raise UserError(f"{key}={text}: a logarithmic range begins above 0")
    if count is not None and int(count) < 2:
        raise UserError(f"{key}={text}: a range has at least 2 values")
    return Range(low, high, bool(log), None if count is None else int(count), whole)


def _refuse_more(count: int, what: str, instead: str) -> None:
    if count > MOST_POINTS:
        raise UserError(f"{what}, at most {MOST_POINTS} are possible; {instead}")


def _text(value: float, whole: bool) -> str:
    return str(round(value)) if whole else f"{value:.{_DIGITS}g}"
