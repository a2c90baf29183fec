"""Several texts in one row: what would be padding becomes training."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from jaxft.data.batch import Field, Fields
from jaxft.data.examples import Split, offsets_of, spans_of


def packed_fields(fields: Fields) -> Fields:
    """The fields of batches whose rows hold several texts each, from those of rows of one text."""
    return {**fields, **dict.fromkeys(("segments", "positions"), Field(("batch", "length")))}


def pack(split: Split, length: int) -> Split:
    """The texts of ``split`` in rows of up to ``length`` tokens: each goes, longest first, to the row that it fits most closely
    (best-fit decreasing; Krell et al. 2021 on packing for BERT).

    Rows carry ``segments`` (1, 2, ... by text) and ``positions`` (from 0 in each text). Which texts share a row depends on
    the texts alone, so that a packed split is read like any other: by (seed, step).
    """
    lengths = split.sizes("length")
    order = np.argsort(-lengths, kind="stable")
    rows = _best_fit(lengths[order], length)
    members = [order[row] for row in rows]
    texts = np.concatenate(members)
    index = spans_of(split.offsets["length"], texts)
    numbers = np.concatenate([np.arange(1, len(row) + 1) for row in members])
    columns = {name: values[index] for name, values in split.columns.items()}
    columns["segments"] = np.repeat(numbers, lengths[texts]).astype(np.int32)
    columns["positions"] = np.concatenate([np.arange(n) for n in lengths[texts]]).astype(np.int32)
    offsets = offsets_of(np.array([lengths[row].sum() for row in members]))
    return Split(split.name, packed_fields(split.fields), columns, {"length": offsets})


def _best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Rows as lists of indices into ``lengths``, which come in falling order."""
    rows: list[list[int]] = []
    # Rows by the room that they have left, and those amounts in order: few, however many rows.
    by_room: dict[int, list[int]] = {}
    amounts: list[int] = []
    for i, size in enumerate(lengths.tolist()):
        place = bisect_left(amounts, size)
        if place == len(amounts):
            row, left = len(rows), room
            rows.append([])
        else:
            left = amounts[place]
            row = by_room[left].pop()
            if not by_room[left]:
                amounts.pop(place)
        rows[row].append(i)
        left -= size
        if not by_room.setdefault(left, []) and left:
            insort(amounts, left)
        by_room[left].append(row)
    return rows
