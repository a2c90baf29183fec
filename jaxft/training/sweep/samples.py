"""The points that a search tries: pure functions of (seed, number), so that a sweep goes on where it was stopped."""

from __future__ import annotations

import hashlib
import itertools
import json

from jaxft.errors import UserError
from jaxft.training.sweep.space import Choices, Point, Range, Space

_FEW = 100_000
"""Spaces of up to so many points, each as likely as any other, are listed and put in a random order."""
_TRIES = 1000


def random_points(space: Space, seed: int, count: int) -> list[Point]:
    """The first ``count`` points of a random search, none twice. More of them begin with the same ones.

    Raises:
      UserError: the space has fewer.
    """
    refuse_counts(space)
    size = space.size
    if size is not None and count > size:
        raise UserError(f"--points {count}: the space has {size} points; give at most that, or use --search grid")
    flat = not any(isinstance(one, Range) and one.log for one in space.dimensions.values())
    if size is not None and size <= _FEW and flat:
        return sorted(_every(space), key=lambda point: _share(seed, json.dumps(point)))[:count]
    found: list[Point] = []
    for index in itertools.count():
        point = random_point(space, seed, index)
        if point not in found:
            found.append(point)
        if len(found) == count:
            return found
        if index > _TRIES * count:
            raise UserError(f"--points {count}: the space has hardly more than {len(found)} points; give fewer")
    raise AssertionError("counting does not end")


def random_point(space: Space, seed: int, index: int) -> Point:
    """Point number ``index``; what a key gets does not depend on which others there are."""
    return {key: one.at(_share(seed, f"{index}/{key}")) for key, one in space.dimensions.items()}


def refuse_counts(space: Space) -> None:
    """Raises UserError if a range says how many values a grid has of it: such a search takes all between its ends."""
    for key, one in space.dimensions.items():
        if isinstance(one, Range) and one.count is not None:
            raise UserError(f"{key}={space.typed[key]}: :{one.count} is for --search grid; leave it out")


def _every(space: Space) -> list[Point]:
    """Every point of a space of choices and whole numbers."""
    points: list[dict[str, str]] = [{}]
    for key, one in space.dimensions.items():
        texts = one.texts if isinstance(one, Choices) else map(str, range(int(one.low), int(one.high) + 1))
        points = [{**point, key: text} for text in texts for point in points]
    return list(points)


def _share(seed: int, name: str) -> float:
    """A number from 0 to below 1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big") / 2**48
