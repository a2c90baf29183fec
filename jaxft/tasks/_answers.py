"""Answers of rows for question answering: which texts they are, where they stand in the context, and on which tokens.

Dims: S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxft.config.tasks.question_answering import Config
from jaxft.data.processors.windows import stripped
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError


class Given(NamedTuple):
    """An answer that a row has."""

    text: str
    start: object = None
    """The first of its characters in the context, as the row says; None: it does not."""


def answers_of(value: object) -> list[Given]:
    """The answers in a cell: one text, texts, or mappings with ``text`` and ``start`` or ``answer_start``; none in an empty list."""
    items: Sequence[object] = value if isinstance(value, list) else [value]
    return [
        Given(_text(one.get("text")), one.get("answer_start", one.get("start")))
        if isinstance(one, Mapping)
        else Given(_text(one))
        for one in items
    ]


def _text(value: object) -> str:
    """An answer's text: as it is, or a whole number as it is written; "" of anything else."""
    return str(value) if isinstance(value, str) or type(value) is int else ""


class Placed(NamedTuple):
    """The answer that is learnt of a row."""

    span: tuple[int, int] | None
    """Its characters; None: it has no place, or there is none."""
    answerable: bool


def placed_answer(row: Row, options: Config) -> Placed:
    """The first answer of a row that has a place in its context.

    Raises:
      UserError: as the options say.
    """
    context, given = str(row.values[1]), answers_of(row.values[2])
    if not given and not options.no_answer:
        raise UserError(
            f"{row.where}: the question has no answer; where that may be (SQuAD v2), set task.no_answer=true"
        )
    spans: list[tuple[int, int]] = []
    problems: list[str] = []
    misplaced = False
    for one in given:
        if not one.text.strip():
            raise UserError(
                f"{row.where}: an answer has no text; give texts, or mappings with text and answer_start, and [] where there is none"
            )
        found = _place_of(one, context, options, row.where)
        if isinstance(found, str):
            problems.append(found)
            misplaced = misplaced or one.start is not None
        else:
            spans.append(found)
    if options.unplaced_answers == "refuse" and problems and (misplaced or not spans):
        raise UserError(f"{row.where}: {problems[0]}; correct the row, or see task.unplaced_answers (first, skip)")
    return Placed(spans[0] if spans else None, bool(given))


def _place_of(one: Given, context: str, options: Config, where: str) -> tuple[int, int] | str:
    """The characters of an answer, or why it has none."""
    text = one.text.strip()
    shown = repr(text if len(text) <= 60 else f"{text[:59]}…")
    if one.start is None:
        count = context.count(text)
        if count > 1 and options.unplaced_answers != "first":
            return f"the answer {shown} occurs {count} times in the context, and no start says which is meant"
        start = context.find(text)
        return (start, start + len(text)) if count else f"the answer {shown} does not occur in the context"
    if isinstance(one.start, bool) or not isinstance(one.start, int | float) or not float(one.start).is_integer():
        raise UserError(
            f"{where}: the start of the answer {shown} is {one.start!r}, which is no character of the context"
        )
    begin = int(one.start)
    if begin < 0 or context[begin : begin + len(one.text)] != one.text:
        there = context[begin : begin + len(one.text)] if begin >= 0 else ""
        return f"the answer {shown} is not at character {begin} of the context, where {there[:60]!r} is"
    return stripped(context, begin, begin + len(one.text))


def tokens_of(
    span: tuple[int, int] | None, offsets: Int32[np.ndarray, "S 2"], begins: bool, ends: bool
) -> tuple[int, int]:
    """The first and the last token that share a character with an answer; (0, 0): the window does not hold it as a whole.

    Args:
      begins: the window begins where the context does; ``ends``: likewise.
    """
    places = np.flatnonzero(offsets[:, 0] >= 0)
    if span is None or not len(places):
        return 0, 0
    begin, finish = offsets[places].T
    if (not begins and begin[0] > span[0]) or (not ends and finish[-1] < span[1]):
        return 0, 0
    inside = places[(finish > span[0]) & (begin < span[1])]
    return (int(inside[0]), int(inside[-1])) if len(inside) else (0, 0)
