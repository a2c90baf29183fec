"""A whole split, tokenised once: compact ragged arrays, with truncation and label problems reported exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.labels import class_ids, label_text
from jaxft.data.sources import Reference, Row, form_of, iter_rows, shown
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError

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
    segments: np.ndarray | None = None
    """[total] int32, of packed rows: which text of the row, from 1."""
    positions: np.ndarray | None = None
    """[total] int32, of packed rows: from 0 in each text."""
    dropped: np.ndarray | None = None
    """[rows] int64, tokens that truncation cut off; None: not known (rows that were chosen or packed)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens per row."""
        return np.diff(self.offsets)

    def digest(self) -> str:
        """A hash of all rows, in order."""
        found = hashlib.sha256()
        for array in (self.offsets, self.tokens, self.types, self.labels):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

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


def read_rows(
    reference: Reference, config: DataConfig, *, labelled: bool = True, note: Callable[[str], None] | None = None
) -> list[Row]:
    """All rows of a source: values are (text, [pair,] label), or without labels (text, [pair]).

    Args:
      note: told what was found out about files, and how many rows were left out.

    Raises:
      UserError: no rows, a text that is not text, no text that is not empty, or a missing label.
    """
    texts = (config.text, *((config.text_pair,) if config.text_pair else ()))
    rows = list(iter_rows(reference, (*texts, config.label) if labelled else texts, form_of(config, note)))
    if not rows:
        raise UserError(f"{shown(reference)}: the data set is empty")
    if config.missing_text == "skip":
        rows = _with_texts(rows, len(texts), shown(reference), note)
    for row in rows:
        check_texts(row, texts, cure="remove the row, or leave such rows out with data.missing_text=skip")
        if not labelled:
            continue
        label = row.values[-1]
        if label_text(label) == "":
            raise UserError(f"{row.where}: column {config.label!r} is empty; every row needs a label")
    if not any(str(text).strip() for row in rows for text in row.values[: len(texts)]):
        raise UserError(
            f"{shown(reference)}: all of its {len(rows)} texts are empty (column {config.text!r}, data.text)"
        )
    return rows


def _with_texts(rows: list[Row], texts: int, reference: str, note: Callable[[str], None] | None) -> list[Row]:
    def has_texts(row: Row) -> bool:
        return not any(_is_missing(value) or value == "" or str(value).isspace() for value in row.values[:texts])

    kept = [row for row in rows if has_texts(row)]
    if not kept:
        raise UserError(f"{reference}: no row has a text (data.missing_text=skip leaves out all {len(rows)})")
    if note and len(kept) < len(rows):
        note(f"{reference}: {len(rows) - len(kept)} of {len(rows)} rows have no text and are left out")
    return kept


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_texts(row: Row, columns: tuple[str, ...], cure: str = "every row needs one here") -> None:
    """Raises UserError if a text column holds anything but text; ``cure``: what to do where there is none."""
    for value, column in zip(row.values, columns, strict=False):
        if _is_missing(value):
            raise UserError(
                f"{row.where}: column {column!r} holds no text ({'null' if value is None else value}); {cure}"
            )
        if not isinstance(value, str):
            raise UserError(f"{row.where}: column {column!r} holds {value!r}, which is not text; set data.text")


def encode_rows(
    name: str,
    rows: list[Row],
    labels: tuple[str, ...] | None,
    tokenizer: Tokenizer,
    *,
    renamed: Mapping[str, str] | None = None,
    split: bool = False,
    end_id: int | None = None,
) -> Split:
    """Tokenises rows.

    Args:
      labels: label names in the order of class ids; None: rows have no labels.
      renamed: names by label, if the rows have others.
      split: texts that are too long become several rows (see :meth:`Tokenizer.encode`).
      end_id: appended to each text that does not end with it and has room.

    Raises:
      UserError: a label that is not among ``labels``; says where.
    """
    classes = None
    if labels is not None:
        classes = class_ids((row.values[-1] for row in rows), (row.where for row in rows), labels, renamed)
    tokens: list[np.ndarray] = []
    types: list[np.ndarray] = []
    dropped: list[int] = []
    for row_ids, row_types, cut in _tokenise(rows, tokenizer, len(rows[0].values) - (labels is not None) == 2, split):
        if end_id is not None and row_ids[-1:] != [end_id] and len(row_ids) != tokenizer.max_length:
            row_ids, row_types = [*row_ids, end_id], [*row_types, row_types[-1] if row_types else 0]
        tokens.append(np.asarray(row_ids, np.int32))
        types.append(np.asarray(row_types, np.int32))
        dropped.append(cut)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])])
    classes = np.zeros(len(tokens), np.int32) if classes is None else classes
    cuts = np.array(dropped, np.int64)
    return Split(
        name, np.concatenate(tokens), np.concatenate(types), offsets, classes, int((cuts > 0).sum()), dropped=cuts
    )


def _tokenise(
    rows: list[Row], tokenizer: Tokenizer, paired: bool, split: bool
) -> Iterator[tuple[list[int], list[int], int]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, _CHUNK)):
        texts = [str(row.values[0]) for row in chunk]
        yield from tokenizer.encode(texts, [str(row.values[1]) for row in chunk] if paired else None, split=split)


def hold_out(rows: list[Row], fraction: float, seed: int, *, labelled: bool = True) -> tuple[list[Row], list[Row]]:
    """Rows split into (kept, held out), with the share of each label kept (stratified); each label keeps one row at least.

    Raises:
      UserError: nothing would be held out.
    """
    by_label: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_label.setdefault(label_text(row.values[-1]) if labelled else "", []).append(i)
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
