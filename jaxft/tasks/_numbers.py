"""What tasks with a number per row share: numbers read from rows, examples that hold them, and answers that are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from jaxft.data.encode import chunks_of, encode_texts
from jaxft.data.examples import Encoded
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.tasks._texts import logits_by_text
from jaxft.tasks.contract import Array, Batch, Forward


def number_of(row: Row, column: str) -> float:
    """The number that a row's last value is.

    Raises:
      UserError: it is none that float32 can hold.
    """
    value = row.values[-1]
    try:
        number = math.nan if isinstance(value, bool) else float(str(value).strip())
    except ValueError:
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise UserError(
            f"{row.where}: column {column!r} holds {value!r:.60}, which is no number that can be learnt; set data.label to the column "
            "of numbers, or use task.name=classification for classes"
        )
    return number


def vector_of(row: Row, column: str, width: int) -> np.ndarray:
    """[W] float32, the numbers that a row's last value holds.

    Raises:
      UserError: they are none that float32 can hold, or not so many.
    """
    value = row.values[-1]
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        raise UserError(
            f"{row.where}: column {column!r} holds {value!r:.60}; expected a list of numbers, a teacher's vector (data.label)"
        )
    found = np.array(value, np.float64)
    if len(found) != width:
        raise UserError(
            f"{row.where}: column {column!r} holds a vector of {len(found)} numbers; task.teacher_width={width} says another width"
        )
    if not (np.abs(found) <= np.finfo(np.float32).max).all():
        raise UserError(
            f"{row.where}: column {column!r} holds a vector with a number that is not finite in float32; remove the row"
        )
    return found.astype(np.float32)


def encode_numbers(rows: Iterable[Row], tokenizer: TextProcessor, column: str, *, labelled: bool) -> Iterator[Encoded]:
    """An example per row: ``tokens``, ``types`` and, if rows are ``labelled``, ``labels``: the number of each, float32."""
    for first, chunk in chunks_of(rows):
        numbers = [number_of(row, column) for row in chunk] if labelled else None
        for one in encode_texts(chunk, tokenizer, paired=len(chunk[0].values) - labelled == 2):
            more = {} if numbers is None else {"labels": np.asarray(numbers[one.row], np.float32)}
            yield one._replace(row=first + one.row, example={**one.example, **more})


def numbers_by_text(forward: Forward, batch: Batch, key: Array | None) -> Array:
    """What a head of one output gives each text, float32 [B] ([B E] of packed rows)."""
    return logits_by_text(forward(batch, key))[:, 0].astype(jnp.float32)


def rounded(number: float) -> float | None:
    """A number in as many digits as float32 has; None if it is not finite."""
    return float(f"{number:.7g}") if math.isfinite(number) else None
