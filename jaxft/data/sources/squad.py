"""Files of SQuAD's own form: ``data``, a list of articles, with ``paragraphs``, with a ``context`` and ``qas``; a row per question."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxft.data.sources.lines import read_lines
from jaxft.data.sources.rows import Carried, Row, json_value, missing_column, refuse_constant
from jaxft.errors import UserError

COLUMNS = ("id", "title", "question", "context", "answers", "is_impossible")
_WANTED = (
    'a .json file must be of SQuAD\'s form, {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}; '
    "rows of other kinds are read from .jsonl, where each line is one object"
)


def iter_squad(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """A row per question. ``answers`` are as the file has them; none where it says that the question ``is_impossible``.

    Raises:
      UserError: not valid JSON, or not of this form.
    """
    with closing(read_lines(path)) as lines:
        text = "".join(lines)
    try:
        whole = json.loads(text, parse_constant=refuse_constant)
    except RecursionError as error:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        problem, line = getattr(error, "msg", str(error)), getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: not valid JSON: {problem}; {_WANTED}") from error
    articles = _list(whole, "data", str(path))
    for name in columns:
        if name not in COLUMNS and not isinstance(name, Carried):
            raise missing_column(name, COLUMNS, str(path))
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(_list(article, "paragraphs", f"{path}: article {i}")):
            for k, question in enumerate(_list(paragraph, "qas", f"{path}: article {i}, paragraph {j}")):
                where = f"{path}: article {i}, paragraph {j}, question {k}"
                yield Row(_values(columns, article, paragraph, question, where), where)


def _list(holder: object, key: str, where: str) -> list[Any]:
    found = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{where}: has no list {key!r}; {_WANTED}")
    return found


def _values(columns: tuple[str, ...], article: Any, paragraph: Any, question: object, where: str) -> tuple[Any, ...]:
    if not isinstance(question, dict):
        raise UserError(f"{where}: is a {type(question).__name__}, not an object; {_WANTED}")
    impossible = question.get("is_impossible", False)
    row = {
        "id": question.get("id"),
        "title": article.get("title"),
        "question": question.get("question"),
        "context": paragraph.get("context"),
        "answers": [] if impossible else question.get("answers"),
        "is_impossible": impossible,
    }
    return tuple(json_value(row.get(name), name, where) for name in columns)
