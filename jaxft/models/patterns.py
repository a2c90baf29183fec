"""Rearrangements of one tensor as einops patterns, theirs -> ours, run both ways; None leaves a tensor as it is."""

from __future__ import annotations

import numpy as np
from einops import rearrange


def their_shape(pattern: str | None, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of their tensor, from that of ours."""
    if pattern is None:
        return ours
    sizes = _sizes(pattern, ours)
    groups = pattern.split("->")[0].replace("(", " ( ").replace(")", " ) ").split()
    dims: list[int] = []
    grouped = False
    for token in groups:
        if token == "(":
            dims.append(1)
            grouped = True
        elif token == ")":
            grouped = False
        elif grouped:
            dims[-1] *= sizes[token]
        else:
            dims.append(sizes[token])
    return tuple(dims)


def to_ours(pattern: str | None, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Their tensor as ours, of shape ``shape``."""
    if pattern is None:
        return tensor
    grouped = set(pattern[pattern.find("(") + 1 : pattern.find(")")].split()) if "(" in pattern else set()
    sizes = {name: size for name, size in _sizes(pattern, shape).items() if name in grouped}
    return rearrange(tensor, pattern, **sizes)


def to_theirs(pattern: str | None, tensor: np.ndarray) -> np.ndarray:
    """Our tensor as theirs."""
    if pattern is None:
        return tensor
    left, right = pattern.split("->")
    return rearrange(tensor, f"{right.strip()} -> {left.strip()}", **_sizes(pattern, tensor.shape))


def _sizes(pattern: str, ours: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(pattern.split("->")[1].split(), ours, strict=True))
