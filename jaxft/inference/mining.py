"""Hard negatives: texts that look like an anchor's partners and are none, found by a model's vectors among all texts, exactly.

Dims: Q different anchors, C different texts of the corpus, D width, P pairs, K negatives of an anchor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxft.config import RunConfig
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.files import JsonObject
from jaxft.inference.predict import Served, make_predictor

_ANCHORS, _TEXTS = 512, 8192
"""Similarities that are held at once: of so many anchors with so many texts."""
_ROUNDING = np.float32(1e-5)
"""By how much cosines that are computed in blocks may be off: what is as near as that is computed again, on its own."""
_NONE = np.iinfo(np.int64).min
"""The key of what cannot be chosen; below that of any score."""


@dataclass(frozen=True)
class Mining:
    """What counts as a hard negative, and which ones are taken."""

    negatives: int = 3
    """How many for each anchor."""
    from_rank: int = 1
    """The nearest candidate that may be taken, counted from 1 among those that scores allow: nearer ones are often right as well."""
    to_rank: int | None = None
    """The farthest one. None: as many as ``top`` takes."""
    max_score: float | None = None
    """The highest cosine that a negative may have."""
    margin: float | None = None
    """By how much it is at least below the cosine of the anchor's partner, the least similar one if there are several."""
    relative_margin: float | None = None
    """The same as a share of the partner's cosine (Moreira et al. 2024, NV-Retriever)."""
    sampling: Literal["top", "random"] = "top"
    """``top``: the nearest ones of the range. ``random``: any, each as likely."""
    seed: int = 0
    """Seed of ``random``."""

    def __post_init__(self) -> None:
        for name, least in (("negatives", 1), ("from_rank", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{_option(name)} {getattr(self, name)}: must be at least {least}")
        if self.to_rank is not None and self.to_rank < self.least_rank:
            raise UserError(
                f"--to-rank {self.to_rank}: ranks {self.from_rank} to {self.to_rank} hold fewer than --negatives {self.negatives}; "
                f"it must be at least {self.least_rank}"
            )
        if self.sampling == "random" and self.to_rank is None:
            raise UserError(
                "--sampling random draws from a range of ranks: say where it ends, for instance --to-rank 50"
            )
        if self.max_score is not None and not -1 <= self.max_score <= 1:
            raise UserError(f"--max-score {self.max_score}: scores are cosines; must be from -1 to 1")
        if self.margin is not None and not 0 <= self.margin <= 2:
            raise UserError(f"--margin {self.margin}: a difference of cosines; must be from 0 to 2")
        if self.relative_margin is not None and not 0 <= self.relative_margin < 1:
            raise UserError(
                f"--relative-margin {self.relative_margin}: a share of the partner's score; must be from 0 to below 1"
            )

    @property
    def least_rank(self) -> int:
        """The last rank that a range of so many negatives needs."""
        return self.from_rank + self.negatives - 1

    def limits(self, partners: np.ndarray) -> np.ndarray:
        """[Q] float32, the highest score that a negative of each anchor may have.

        Args:
          partners: [Q] the score of each anchor's partner.
        """
        found = np.full(len(partners), np.inf if self.max_score is None else self.max_score)
        partners = partners.astype(np.float64)
        if self.margin is not None:
            found = np.minimum(found, partners - self.margin)
        if self.relative_margin is not None:  # of a negative score, too, below it
            found = np.minimum(found, partners - np.abs(partners) * self.relative_margin)
        return found.astype(np.float32)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


class Mined(NamedTuple):
    """The negatives of anchors, the nearest first."""

    chosen: np.ndarray
    """[Q, K] int64, numbers of texts; -1: there are no more."""
    scores: np.ndarray
    """[Q, K] float32, their cosines; NaN where there is none."""
    partners: np.ndarray
    """[P] float32, the cosine of each pair."""

    @property
    def counts(self) -> np.ndarray:
        """[Q] negatives that were found."""
        return (self.chosen >= 0).sum(1)


def mine(
    anchors: np.ndarray,
    texts: np.ndarray,
    pairs: np.ndarray,
    itself: np.ndarray,
    options: Mining,
    among: int | None = None,
) -> Mined:
    """The hard negatives of each anchor: the nearest texts by cosine that are neither its partners nor itself, as ``options`` say.

    All texts are looked at, a block of similarities at a time. Among equal scores, the text that comes first is nearer.

    Args:
      anchors: [Q, D].
      texts: [C, D].
      pairs: [P, 2] int: an anchor, and the text that is its partner. Each anchor has one.
      itself: [Q] int, the text that is the anchor's very words; -1: there is none.
      among: negatives are chosen from so many texts, the first ones; None: from all.
    """
    among = len(texts) if among is None else among
    anchors, texts = _units(anchors), _units(texts)
    partners = _cosines(anchors, texts, *pairs.T)
    least = np.full(len(anchors), np.inf, np.float32)
    np.minimum.at(least, pairs[:, 0], partners)
    limits = options.limits(least)
    own = np.stack([np.arange(len(anchors)), itself], 1)
    barred = np.unique(np.concatenate([pairs, own[itself >= 0]]), axis=0)
    barred = barred[barred[:, 1] < among]
    chosen = np.full((len(anchors), options.negatives), -1)
    scores = np.full(chosen.shape, np.nan, np.float32)
    for first in range(0, len(anchors), _ANCHORS):
        part = slice(first, first + _ANCHORS)
        mine = barred[slice(*np.searchsorted(barred[:, 0], [first, first + _ANCHORS]))] - [first, 0]
        keys = _nearest(anchors[part], texts[:among], mine, limits[part], options.to_rank or options.least_rank)
        for anchor, ranked in enumerate(keys, first):
            taken = _taken(ranked, anchor, options)
            chosen[anchor, : len(taken)], scores[anchor, : len(taken)] = _text_of(taken), _score_of(taken)
    return Mined(chosen, scores, partners)


def _units(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _cosines(anchors: np.ndarray, texts: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float32 of unit vectors ``anchors[rows]`` and ``texts[columns]``, the same whatever else is computed beside them."""
    found = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), _TEXTS):
        part = slice(first, first + _TEXTS)
        found[part] = np.einsum("nd,nd->n", anchors[rows[part]], texts[columns[part]], dtype=np.float64)
    return found


def _nearest(anchors: np.ndarray, texts: np.ndarray, barred: np.ndarray, limits: np.ndarray, most: int) -> np.ndarray:
    """[Q, up to ``most``] the keys of the nearest texts that are allowed, the nearest first."""
    best = np.empty((len(anchors), 0), np.int64)
    by_text, limits = barred[barred[:, 1].argsort(kind="stable")], limits[:, None]
    for first in range(0, len(texts), _TEXTS):
        near = anchors @ texts[first : first + _TEXTS].T
        rows, columns = by_text[slice(*np.searchsorted(by_text[:, 1], [first, first + _TEXTS]))].T
        near[rows, columns - first] = -np.inf
        floor = _floor(np.where(near > limits - _ROUNDING, -np.inf, near), best, most) - _ROUNDING
        rows, columns = np.nonzero((near >= floor[:, None]) & (near <= limits + _ROUNDING))
        scores = _cosines(anchors, texts, rows, columns + first)
        keys = np.where(scores <= limits[rows, 0], _keys(scores, columns + first), _NONE)
        best = np.concatenate([best, _by_row(keys, rows, len(anchors))], 1)
        best = np.sort(best, axis=1)[:, ::-1][:, :most]
    return best


def _floor(near: np.ndarray, best: np.ndarray, most: int) -> np.ndarray:
    """[Q] the score that a text must have to be among the ``most`` nearest; below any cosine where all that are allowed may be."""
    found = np.full(len(near), -2, np.float32)
    if best.shape[1] == most:
        found = np.where(best[:, -1] == _NONE, found, _score_of(best[:, -1]))
    if (place := near.shape[1] - most) > 0:
        found = np.maximum(found, np.partition(near, place, axis=1)[:, place])
    return found


def _by_row(keys: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """[Q, the most that a row has] the keys of each row; ``rows`` are in order."""
    counts = np.bincount(rows, minlength=count)
    found = np.full((count, counts.max(initial=0)), _NONE)
    found[rows, np.arange(len(rows)) - (counts.cumsum() - counts)[rows]] = keys
    return found


def _keys(scores: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """int64 in the order of scores, float32, and of equal ones from the last text to the first."""
    bits = scores.view(np.int32)
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64)
    return ordered << 32 | (0xFFFFFFFF - texts)


def _text_of(keys: np.ndarray) -> np.ndarray:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _score_of(keys: np.ndarray) -> np.ndarray:
    bits = (keys >> 32).astype(np.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(np.float32)


def _taken(ranked: np.ndarray, anchor: int, options: Mining) -> np.ndarray:
    """The keys of an anchor's negatives, out of those of its candidates by rank."""
    among = ranked[ranked != _NONE][options.from_rank - 1 :]
    if options.sampling == "random" and len(among) > options.negatives:
        rng = np.random.default_rng([options.seed, anchor])  # whatever block it is in
        return among[np.sort(rng.choice(len(among), options.negatives, replace=False))]
    return among[: options.negatives]


class Pairs(NamedTuple):
    """Pairs of texts by number. Texts are equal but for blanks around them."""

    pairs: np.ndarray
    """[P, 2] int64: an anchor, and the text that is its partner."""
    spelt: list[tuple[str, str]]
    """The texts of each pair, as they were given."""
    anchors: list[str]
    """[Q]"""
    texts: list[str]
    """[C]"""
    itself: np.ndarray
    """[Q] int64, the text that is the anchor's very words; -1: there is none."""
    among: int
    """Texts that negatives are chosen from, the first ones; the others are partners alone."""


def numbered(pairs: Iterable[tuple[str, ...]], corpus: Iterable[str] | None = None) -> Pairs:
    """The different texts of pairs, numbered in the order in which they come.

    Args:
      corpus: what negatives are chosen from; None: from the partners of all anchors.
    """
    anchors, texts, found, spelt = _Texts(), _Texts(), [], []
    for text in corpus or ():
        texts.number(text)
    among = len(texts.spelt)
    for anchor, partner in pairs:
        found.append((anchors.number(anchor), texts.number(partner)))
        spelt.append((anchor, partner))
    itself = np.array([texts.find(anchor) for anchor in anchors.spelt], np.int64)
    among = len(texts.spelt) if corpus is None else among
    return Pairs(np.array(found, np.int64), spelt, anchors.spelt, texts.spelt, itself, among)


class _Texts:
    """Different texts by number; each is kept as it is spelt where it comes first."""

    def __init__(self) -> None:
        self.spelt: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        found = self._numbers.setdefault(text.strip(), len(self.spelt))
        if found == len(self.spelt):
            self.spelt.append(text)
        return found

    def find(self, text: str) -> int:
        return self._numbers.get(text.strip(), -1)


def embedding_config(served: Served) -> RunConfig:
    """The configuration of a model whose answers are vectors of texts.

    Raises:
      UserError: they are not.
    """
    config = served.config_for(served.module())
    if not hasattr(config.task, "embed_as"):
        raise UserError(
            f"the model answers with {served.model.head}, not with vectors of texts; name a folder of embeddings"
        )
    return config


def pair_vectors(
    served: Served, anchors: Sequence[str], texts: Sequence[str], batch_size: int, note: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """[Q, D] and [C, D] float32: the vectors of anchors, which stand first in pairs, and of texts that stand second; each different text
    is computed once.

    Args:
      note: told how far it is, and how many texts were truncated.

    Raises:
      UserError: the model gives NaN.
    """
    config = embedding_config(served)
    options = config.task

    def vectors(texts: Sequence[str], role: str) -> np.ndarray:
        changed: JsonObject = {"embed_as": role}
        asked = dataclasses.replace(config, task=dataclasses.replace(options, **changed))
        return _vectors(dataclasses.replace(served, config=asked), texts, batch_size, note)

    if getattr(options, "query_prompt", None) != getattr(options, "text_prompt", None):
        return vectors(anchors, "query"), vectors(texts, "text")
    together = _Texts()
    first, second = ([together.number(text) for text in some] for some in (anchors, texts))
    made = vectors(together.spelt, "text")
    return made[first], made[second]


def _vectors(served: Served, texts: Sequence[str], batch_size: int, note: Callable[[str], None]) -> np.ndarray:
    predict = make_predictor(served, batch_size)[1]
    made: list[np.ndarray] = []
    cut = 0
    for chunk in _chunks(texts, 64 * batch_size):
        for parts in predict([Row((text,), "") for text in chunk]):
            made.append(parts[0][1]["vectors"][0])
            cut += any(one.dropped for one, _ in parts)
        if len(texts) > len(chunk):
            note(f"{len(made)} of {len(texts)} texts have their vectors")
    found = np.stack(made).astype(np.float32)
    if bad := np.flatnonzero(~np.isfinite(found).all(1)).tolist():
        raise UserError(
            f"the model gives {len(bad)} of {len(texts)} texts no vector (NaN), {texts[bad[0]]!r:.60} first"
        )
    if cut:
        note(f"{cut} of {len(texts)} texts were truncated to {served.tokenizer.max_length} tokens (data.max_length)")
    return found


def _chunks(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for first in range(0, len(texts), size):
        yield texts[first : first + size]


def spread_of(scores: np.ndarray) -> str:
    """The mean of some scores, and where 5, 50 and 95 % of them end, on one line."""
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return "none"
    low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
    return f"mean {scores.mean():.3f}, 5 % below {low:.3f}, half below {middle:.3f}, 95 % below {high:.3f}"
