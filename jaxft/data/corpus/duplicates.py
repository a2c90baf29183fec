"""Documents that an earlier one says as well: exactly, or nearly (MinHash, Broder 1997, in bands)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxft.data.corpus.files import Hashed, written_whole
from jaxft.data.corpus.options import Options
from jaxft.data.corpus.parts import Counts, Part, check_sizes, documents_of

BANDS, ROWS = 16, 8
"""Documents that share a share s of their shingles are told apart with probability (1 - s**ROWS)**BANDS: one half at s = 0.67."""
_SHINGLE = 5  # words
_EXACT, _NEAR = 1, 2


class Task(NamedTuple):
    """A part whose documents are to be hashed."""

    number: int
    part: Part


def text_hash(text: str) -> int:
    """64 bits of a text. Of a thousand million texts, two differing ones share them with a chance of 3 %."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hashes_file(folder: Path, number: int) -> Path:
    """Where the hashes of a part's documents are kept while a corpus is built."""
    return folder / f"hashes-{number:05d}.bin"


def make_hasher(folder: Path, options: Options) -> Callable[[Task], int]:
    """What hashes the documents of a part; gives how many there are."""
    return partial(_hash_part, folder, options)


def _hash_part(folder: Path, options: Options, task: Task) -> int:
    check_sizes(task.part)
    rows: list[np.ndarray] = []
    for document in documents_of(task.part, options, Counts(), lambda text: None):
        exact = np.array([text_hash(document.text)], np.uint64)
        rows.append(np.concatenate([exact, bands_of(document.text)]) if options.duplicates == "near" else exact)
    with written_whole(hashes_file(folder, task.number)) as file:
        Hashed(file).write(np.array(rows, "<u8"))
    return len(rows)


def find_duplicates(folder: Path, count: int, options: Options) -> list[np.ndarray]:
    """For each part, [documents] uint8: 0 for those that stay, 1 for copies of an earlier document, 2 for those that are nearly one.

    Every hash is held in memory: 24 bytes for each document where copies are sought, several times as many for near ones.
    """
    columns = 1 + (BANDS if options.duplicates == "near" else 0)
    parts = [np.fromfile(hashes_file(folder, number), "<u8").reshape(-1, columns) for number in range(count)]
    ends = np.cumsum([len(part) for part in parts])
    found = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for column in reversed(range(columns)):
        values = np.concatenate([part[:, column] for part in parts])
        order = np.argsort(values, kind="stable")
        same = values[order[1:]] == values[order[:-1]]
        found[order[1:][same]] = _NEAR if column else _EXACT
    return np.split(found, ends[:-1])


def _coefficients() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(20261127)  # part of the format: other numbers would find other near copies
    high = 1 << 61
    return rng.integers(1, high, BANDS * ROWS, np.uint64), rng.integers(0, high, BANDS * ROWS, np.uint64)


_FACTORS, _TERMS = _coefficients()


def bands_of(text: str) -> np.ndarray:
    """[BANDS] uint64, one of which two texts share if many of their stretches of five words are the same."""
    words = text.lower().split()
    hashes = np.array([hash_word(word) for word in words], np.uint64)
    count = max(1, len(hashes) - _SHINGLE + 1)
    shingles = np.zeros(count, np.uint64)
    for place in range(min(_SHINGLE, len(hashes))):
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + count]
    shingles = np.unique(shingles)
    lowest = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
    for first in range(0, len(shingles), 1024):
        mixed = shingles[first : first + 1024, None] * (_FACTORS | np.uint64(1)) + _TERMS
        mixed ^= mixed >> np.uint64(29)
        lowest = np.minimum(lowest, (mixed * np.uint64(0xBF58476D1CE4E5B9)).min(0))
    bands = np.zeros(BANDS, np.uint64)
    for row in lowest.reshape(BANDS, ROWS).T:
        bands = (bands ^ row) * np.uint64(0x9E3779B97F4A7C15)
        bands ^= bands >> np.uint64(32)
    return bands + np.arange(BANDS, dtype=np.uint64)


def hash_word(word: str) -> int:
    """64 bits of a word, the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def counted(found: Sequence[np.ndarray]) -> tuple[int, int]:
    """How many documents are copies, and how many nearly are."""
    copies, near = (sum(int((part == kind).sum()) for part in found) for kind in (_EXACT, _NEAR))
    return copies, near
