"""A whole split, tokenised once: compact ragged arrays, with truncation and label problems reported exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.sources import Row, iter_rows
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError, nearest

_CHUNK = 1024  # rows tokenised at a time: enough to keep the tokenizer's threads busy


@dataclass(frozen=True)
class Split:
    """Tokenised rows. Row i holds ``tokens[offsets[i]:offsets[i + 1]]``."""

    name: str
    tokens: np.ndarray
    """[total] int32."""
    types: np.ndarray
    """[total] int32 token types."""
    offsets: np.ndarray
    """[rows + 1] int64."""
    labels: np.ndarray
    """[rows] int32 class ids."""
    truncated: int
    """Rows that were longer than ``max_length``."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens per row."""
        return np.diff(self.offsets)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens, token types and class id of one row."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.types[span], int(self.labels[i])

    def select(self, rows: np.ndarray, name: str) -> Split:
        """The split of some of the rows, in the order given."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows]
        index = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        cut = self.truncated if len(rows) == len(self) else -1
        return Split(name, self.tokens[index], self.types[index], offsets, self.labels[rows], cut)


def read_rows(reference: str, config: DataConfig) -> list[Row]:
    """All rows of a labelled source: values are (text, [pair,] label).

    Raises:
      UserError: no rows, or a text that is not text.
    """
    columns = (config.text, *((config.text_pair,) if config.text_pair else ()), config.label)
    rows = list(iter_rows(reference, columns))
    if not rows:
        raise UserError(f"{reference}: the data set is empty")
    texts = columns[:-1]
    for row in rows:
        check_texts(row, texts)
        label = row.values[-1]
        if label is None or label_text(label) == "":
            raise UserError(f"{row.where}: column {config.label!r} is empty; every row needs a label")
    return rows


def check_texts(row: Row, columns: tuple[str, ...]) -> None:
    """Raises UserError if a text column holds anything but text."""
    for value, column in zip(row.values, columns, strict=False):
        if not isinstance(value, str):
            raise UserError(f"{row.where}: column {column!r} holds {value!r}, which is not text; set data.text")


def label_text(value: object) -> str:
    """A label as text: 1, 1.0 and "1" are the same class, as are true and "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def sorted_labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """The distinct labels of rows: numbers in order of value if all are numbers, else in order of code points.

    Class ids are part of a model, so the order must be one and the same in every process: names of equal value ("1",
    "01") are told apart by their code points, and NaN, which has no place in an order, counts as a word.
    """
    names = sorted({label_text(row.values[-1]) for row in rows})
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return tuple(names)
    if any(math.isnan(value) for value in values.values()):
        return tuple(names)
    return tuple(sorted(names, key=lambda name: values[name]))


def encode_rows(name: str, rows: list[Row], labels: tuple[str, ...], tokenizer: Tokenizer) -> Split:
    """Tokenises labelled rows.

    Raises:
      UserError: a label that is not among ``labels``; says where.
    """
    ids = {label: i for i, label in enumerate(labels)}
    classes = np.empty(len(rows), np.int32)
    for i, row in enumerate(rows):
        label = label_text(row.values[-1])
        if label not in ids:
            raise UserError(f"{row.where}: unknown label {label!r}: {nearest(label, labels)}")
        classes[i] = ids[label]
    lengths = np.empty(len(rows), np.int64)
    tokens: list[np.ndarray] = []
    types: list[np.ndarray] = []
    truncated = 0
    for i, (row_ids, row_types, cut) in enumerate(_tokenise(rows, tokenizer)):
        tokens.append(np.asarray(row_ids, np.int32))
        types.append(np.asarray(row_types, np.int32))
        lengths[i] = len(row_ids)
        truncated += cut
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Split(name, np.concatenate(tokens), np.concatenate(types), offsets, classes, truncated)


def _tokenise(rows: list[Row], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int], bool]]:
    paired = len(rows[0].values) == 3
    remaining = iter(rows)
    while chunk := list(islice(remaining, _CHUNK)):
        texts = [str(row.values[0]) for row in chunk]
        yield from tokenizer.encode(texts, [str(row.values[1]) for row in chunk] if paired else None)


def hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows split into (kept, held out), with the share of each label kept (stratified); each label keeps one row at least.

    Raises:
      UserError: nothing would be held out.
    """
    by_label: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_label.setdefault(label_text(row.values[-1]), []).append(i)
    rng = np.random.default_rng([seed, 0x5EED])
    held: set[int] = set()
    for label in sorted(by_label):
        members = np.array(by_label[label])
        count = min(round(fraction * len(members)), len(members) - 1)
        held.update(rng.permutation(members)[:count].tolist())
    if not held:
        raise UserError(f"data.eval_fraction={fraction} holds out no row of {len(rows)}; set data.eval")
    kept = [row for i, row in enumerate(rows) if i not in held]
    return kept, [row for i, row in enumerate(rows) if i in held]
