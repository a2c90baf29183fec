"""Files of SQuAD's own form: ``data``, a list of articles, with ``paragraphs``, with a ``context`` and ``qas``; a row per question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxft.data.sources.rows import Carried, Row, json_value, missing_column
from jaxft.errors import UserError

COLUMNS = ("id", "title", "question", "context", "answers", "is_impossible")
_WANTED = (
    'articles of SQuAD\'s form are {"paragraphs": [{"context": ..., "qas": [{"question": ..., "answers": [...]}]}]}'
)


def iter_squad(articles: Iterable[object], columns: tuple[str, ...], path: Path) -> Iterator[Row]:
    """A row per question. ``answers`` are as the file has them; none where it says that the question ``is_impossible``.

    Args:
      articles: the list that the file holds as its ``data``.

    Raises:
      UserError: not of this form.
    """
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
