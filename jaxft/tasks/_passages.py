"""Documents of any length as stretches that a model can see, such that each token is scored once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Stretch(NamedTuple):
    """Some places of a document, from 0, the last ones excluded."""

    start: int
    stop: int
    first: int
    """The first place that is scored."""
    last: int
    """The one after the last that is scored."""


def stretches_before(size: int, length: int, stride: int) -> Iterator[Stretch]:
    """Stretches of ``size`` places where each sees those before it: it has ``stride`` of them at least, or all that there are.

    Args:
      length: places of a stretch, at most; more than ``stride``.
      stride: places that a stretch has in common with the one before.
    """
    done = 0
    while done < size:
        stop = min(size, length if not done else done - stride + length)
        yield Stretch(max(0, stop - length), stop, done, stop)
        done = stop


def stretches_around(size: int, length: int, stride: int) -> Iterator[Stretch]:
    """The same where each place sees those on both sides: half of ``stride`` on either, or all that there are."""
    done = start = 0
    while done < size:
        stop = min(size, start + length)
        start = max(0, stop - length)
        last = size if stop == size else stop - (stride + 1) // 2
        yield Stretch(start, stop, done, last)
        done, start = last, stop - stride
