"""Chunks of a recording that overlap, and their transcripts put together: where they are most alike, as the reference does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxft.errors import UserError


def chunks_of(samples: int, rate: int, seconds: float, overlap: float | None, longest: float) -> list[tuple[int, int]]:
    """(first sample, last one + 1) of each chunk.

    Args:
      seconds: of a chunk. overlap: seconds at each of its ends that its neighbour has too; None: a sixth.
      longest: seconds that a chunk may have.

    Raises:
      UserError: chunks are too long, or nothing but overlaps.
    """
    beside = seconds / 6 if overlap is None else overlap
    if not 0 < seconds <= longest:
        raise UserError(
            f"chunks of {seconds:g} s: must be above 0 and at most {longest:g} s, what the model hears at once"
        )
    length, shared = round(seconds * rate), round(beside * rate)
    step = length - 2 * shared
    if shared < 0 or step <= 0:
        raise UserError(
            f"chunks of {seconds:g} s with {beside:g} s at each end: overlaps must be from 0 to less than half"
        )
    found = []
    for start in range(0, samples, step):
        stop = min(start + length, samples)
        if not found or stop - start > shared:
            found.append((start, stop))
        if start + length >= samples:
            break
    return found


def merged(parts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of transcripts that overlap, one after the other: each is joined to the next where most tokens of the end of the one are those
    of the beginning of the other, the left half of what they share taken from the one, the right half from the other."""
    if not parts:
        return []
    whole: list[int] = []
    left = list(parts[0])
    for part in parts[1:]:
        right = list(part)
        best, where = 0.0, (len(left), len(left), 0, 0)
        one, other = np.array(left), np.array(right)
        for shift in range(1, len(left) + len(right)):
            of_left = (max(0, len(left) - shift), min(len(left), len(left) + len(right) - shift))
            of_right = (max(0, shift - len(left)), min(len(right), shift))
            matches = int((one[slice(*of_left)] == other[slice(*of_right)]).sum())
            quality = matches / shift + shift / 10000.0  # of equals, the longer
            if matches > 1 and quality > best:
                best, where = quality, (*of_left, *of_right)
        whole += left[: (where[0] + where[1]) // 2]
        left = right[(where[2] + where[3]) // 2 :]
    return whole + left
