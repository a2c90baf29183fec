"""Examples of several texts each, one after the other in a row, each seen by itself alone.

Dims: B rows, S tokens, P texts that an example can have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxft.data.batch import Field, Fields, text_fields


def joined(encoded: Sequence[tuple[list[int], list[int], int]], most: int) -> tuple[dict[str, np.ndarray], int]:
    """The texts of an example (ids, types, tokens that were cut off) one after the other, and how many tokens of them were cut off:
    ``tokens``, ``types``, which text and place each is of (``segments`` from 1, ``positions`` from 0), where each text begins
    (``starts``, ``most`` of them; of texts that there are not, 0)."""
    sizes = [len(ids) for ids, _, _ in encoded]
    example = {
        "tokens": np.array([token for ids, _, _ in encoded for token in ids], np.int32),
        "types": np.array([kind for _, types, _ in encoded for kind in types], np.int32),
        "segments": np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
        "positions": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        "starts": np.array([*np.cumsum([0, *sizes[:-1]]), *[0] * (most - len(sizes))], np.int32),
    }
    return example, sum(dropped for _, _, dropped in encoded)


def several_fields(pad_id: int, texts: int) -> Fields:
    """The fields of such rows: those of texts, ``segments`` and ``positions`` [B, S], and ``starts`` [B, P]."""
    places = Field(("batch", "length"))
    return {
        **text_fields(pad_id),
        "segments": places,
        "positions": places,
        "starts": Field(("batch", texts)),
    }
