"""Rows that are there more than once: in training and again among held-out rows, or with different labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxft.data.examples import Split
from jaxft.data.packing import CLASSES


class Duplicates(NamedTuple):
    """What is there more than once. Two examples are the same if the model is given the same tokens."""

    shared: np.ndarray
    """[n] int64: held-out examples that are training examples as well."""
    twins: np.ndarray
    """[n] int64: the first training example that each of these is the same as."""
    repeated: int
    """Training examples that were there before."""
    contradicted: int
    """How many of these have another label than the first of their kind; 0 where labels are not those of whole texts."""


def duplicates(train: Split, held_out: Split) -> Duplicates:
    """Compares all examples of two splits, by a hash of their tokens and types."""
    first: dict[bytes, int] = {}
    labelled = "labels" in train.columns and train.axis("labels") in (None, CLASSES)
    repeated = contradicted = 0
    for number, key in enumerate(_keys(train)):
        before = first.setdefault(key, number)
        if before != number:
            repeated += 1
            contradicted += labelled and not np.array_equal(train[before]["labels"], train[number]["labels"])
    pairs = [(number, first[key]) for number, key in enumerate(_keys(held_out)) if key in first]
    shared, twins = np.array(pairs, np.int64).reshape(-1, 2).T
    return Duplicates(shared, twins, repeated, int(contradicted))


def _keys(split: Split) -> Iterator[bytes]:
    for number in range(len(split)):
        example = split[number]
        file = next((example[name] for name in ("image", "audio") if name in example), None)
        if file is not None:
            yield hashlib.blake2b(np.ascontiguousarray(file).data, digest_size=16).digest()
            continue
        found = hashlib.blake2b(np.ascontiguousarray(example["tokens"], np.int32).data, digest_size=16)
        if "types" in example:
            found.update(np.ascontiguousarray(example["types"], np.int32).data)
        yield found.digest()


def duplicates_text(found: Duplicates, held_out: int, what: str = "held-out") -> str:
    """Everything that is there more than once, on one line.

    Args:
      held_out: how many examples there are that training examples were compared with.
      what: these are called.
    """
    parts = [f"{found.repeated} training rows were there before"]
    if found.contradicted:
        parts[0] += f" ({found.contradicted} with another label)"
    return f"{parts[0]}; {len(found.shared)} of {held_out} {what} rows are training rows as well"
