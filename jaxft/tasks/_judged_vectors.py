"""Rows of sentence embeddings as they are told: their texts, how near these are, and what stood in the way.

What is wrong with a row depends on what is learnt. Where rows have numbers, it is how far the cosine (``cosine``), its place among the
rows (``cosent``) or the margin (``margin_mse``) is from them; of a triplet, that its hardest negative is nearer than the partner; of
other pairs, that some other row's text is; of a student, how far its vectors are from the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from jaxft.config.tasks.embedding import NEED_NUMBERS, Config
from jaxft.tasks._correlation import ranks
from jaxft.tasks._nearest import cosines, margins, nearest_wrong, taught_cosines
from jaxft.tasks._numbers import rounded
from jaxft.tasks.contract import Arrays


def judged_rows(options: Config, outputs: Arrays, rows: Sequence[Sequence[object]]) -> Iterator[dict[str, object]]:
    """A mapping for each row.

    Args:
      outputs: of the task, in the order of the rows.
    """
    if options.loss == "distillation":
        near = taught_cosines(outputs["vectors"], outputs["texts"], outputs["teacher"])
        for row, cosine in zip(rows, near.tolist(), strict=True):
            yield {"text": row[0], **({"pair": row[1]} if len(row) > 2 else {}), "similarity": rounded(cosine)}
        return
    near = cosines(outputs["vectors"])
    if options.loss in NEED_NUMBERS:
        more = _off(options, outputs, near)
    elif options.loss == "triplet":
        more = _hardest(outputs, rows, near)
    else:
        more = _in_the_way(outputs, rows, near)
    for row, cosine, said in zip(rows, near[:, 0].tolist(), more, strict=True):
        yield {"text": row[0], "pair": row[1], "similarity": rounded(cosine), **said}


def wrongness(judged: Mapping[str, object]) -> float | None:
    """How bad a row is, more is worse; None: it is right."""
    similarity = cast("float | None", judged["similarity"])
    if similarity is None:
        return math.inf
    if "error" in judged:
        error = cast("float | None", judged["error"])
        return math.inf if error is None else abs(error) or None
    if "right" not in judged:  # a teacher's vector, which is never met
        return 1 - similarity
    other = next((judged[name] for name in ("nearest_similarity", "negative_similarity") if name in judged), None)
    return None if judged["right"] or other is None else cast(float, other) - similarity


def _off(options: Config, outputs: Arrays, near: np.ndarray) -> Iterator[dict[str, object]]:
    """The number of each row, and by how much the model's is off: for ``cosent``, which is of their order alone, by how many rows."""
    true, said = outputs["labels"].astype(np.float64), near[:, 0]
    found: dict[str, np.ndarray] = {"true": true}
    if options.loss == "margin_mse":
        said = found["margin"] = margins(outputs["vectors"])
    if options.loss == "cosent":
        found |= {"rank": ranks(said), "true_rank": ranks(true)}
        found["error"] = np.where(np.isnan(said), np.nan, found["rank"] - found["true_rank"])
    else:
        found["error"] = said - true
    for values in zip(*(column.tolist() for column in found.values()), strict=True):
        yield dict(zip(found, map(rounded, values), strict=True))


def _hardest(outputs: Arrays, rows: Sequence[Sequence[object]], near: np.ndarray) -> Iterator[dict[str, object]]:
    """The negative of each row that is nearest to its text."""
    others = np.where(outputs["texts"][:, 2:] >= 0, near[:, 1:], -np.inf)
    for number, (row, which) in enumerate(zip(rows, others.argmax(1).tolist(), strict=True)):
        cosine = float(others[number, which])
        text = None if cosine == -math.inf else _texts(row)[2 + which]
        yield {"negative": text, "negative_similarity": rounded(cosine), "right": bool(near[number, 0] > cosine)}


def _in_the_way(outputs: Arrays, rows: Sequence[Sequence[object]], near: np.ndarray) -> Iterator[dict[str, object]]:
    """The place of each row's partner among all texts that could be found, and the wrong one that is nearest."""
    found = nearest_wrong(outputs["vectors"], outputs["texts"])
    for number, (place, example, which, cosine) in enumerate(zip(*(one.tolist() for one in found), strict=True)):
        if example < 0:
            yield {
                "place": place,
                "nearest": None,
                "nearest_similarity": None,
                "right": not math.isnan(near[number, 0]),
            }
            continue
        text = _texts(rows[example])[which]
        yield {"place": place, "nearest": text, "nearest_similarity": rounded(cosine), "right": place == 1}


def _texts(row: Sequence[object]) -> list[object]:
    """The texts of a row one after the other, as the vectors of an example are."""
    return [text for value in row for text in (value if isinstance(value, list) else [value])]
