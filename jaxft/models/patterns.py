"""Rearrangements of one tensor as einops patterns, theirs -> ours, run both ways."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np


class Pattern:
    """One rearrangement, parsed: dimensions of theirs may be groups of ours (``(n h) d -> d n h``)."""

    def __init__(self, text: str) -> None:
        left, arrow, right = text.partition("->")
        self.theirs = tuple(_groups(left))
        """The names in each dimension of theirs."""
        self.ours = tuple(right.split())
        """The name of each dimension of ours."""
        names = [name for group in self.theirs for name in group]
        if not arrow or sorted(names) != sorted(self.ours) or len(set(names)) != len(names):
            raise ValueError(f"pattern {text!r}: both sides must hold the same names, each once")
        self._to_ours = tuple(names.index(name) for name in self.ours)
        self._to_theirs = tuple(self.ours.index(name) for name in names)

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor, from that of ours."""
        sizes = self._sizes(ours)
        return tuple(math.prod(sizes[name] for name in group) for group in self.theirs)

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their tensor as ours, of shape ``shape``."""
        sizes = self._sizes(shape)
        return tensor.reshape([sizes[name] for group in self.theirs for name in group]).transpose(self._to_ours)

    def to_theirs(self, tensor: np.ndarray) -> np.ndarray:
        """Our tensor as theirs."""
        return tensor.transpose(self._to_theirs).reshape(self.their_shape(tensor.shape))

    def _sizes(self, ours: tuple[int, ...]) -> Mapping[str, int]:
        return dict(zip(self.ours, ours, strict=True))


@functools.cache
def parsed(text: str) -> Pattern:
    """The pattern of a text; each text is parsed once."""
    return Pattern(text)


@functools.cache
def unchanged(rank: int) -> Pattern:
    """The pattern that leaves a tensor of so many dimensions as it is."""
    names = " ".join(f"d{i}" for i in range(rank))
    return Pattern(f"{names} -> {names}")


def _groups(side: str) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            inside = []
        elif token == ")":
            groups.append(tuple(inside or ()))
            inside = None
        elif inside is not None:
            inside.append(token)
        else:
            groups.append((token,))
    return groups
