"""Scores of answers as the official scripts of SQuAD v1 and v2 define them, as shares of 1."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """A text as answers are compared: lower case, without ASCII punctuation, English articles and superfluous blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def gold_answers(texts: Sequence[str], no_answer: bool) -> list[str]:
    """The right answers as they are compared.

    Args:
      no_answer: as v2 has it: answers of which nothing is left are none, and where there is none, "" is right.
    """
    found = [normalised(text) for text in texts]
    return ([one for one in found if one] or [""]) if no_answer else found


def exact_match(predicted: str, golds: Sequence[str]) -> float:
    """1 if a normalised answer is one of the right ones, else 0."""
    return float(predicted in golds)


def answer_f1(predicted: str, golds: Sequence[str], no_answer: bool) -> float:
    """The best F1 that the words of a normalised answer have with those of a right one.

    Args:
      no_answer: as v2 has it: where one of the two has no words, it is 1 if neither has, else 0; v1 always has 0 there.
    """
    return max((_words_f1(predicted.split(), gold.split(), no_answer) for gold in golds), default=0.0)


def _words_f1(predicted: list[str], gold: list[str], no_answer: bool) -> float:
    if not predicted or not gold:
        return float(no_answer and predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


class Scored(NamedTuple):
    """How well one question was answered."""

    answerable: bool
    exact: float
    """Exact match of its best answer, whether that was given or "no answer" was."""
    f1: float
    margin: float
    """By how much the score of "no answer" is higher than that of its best answer."""
    answers: bool = True
    """There is such an answer; it may be one of which nothing is left once it is normalised."""


def after_threshold(one: Scored, threshold: float) -> Scored:
    """The same where nothing is answered if the margin is above a threshold."""
    if not one.margin > threshold:
        return one
    said = float(not one.answerable)
    return one._replace(exact=said, f1=said)


def averages(scored: Sequence[Scored]) -> tuple[float, float]:
    """Exact match and F1 over questions; NaN of none."""
    if not scored:
        return math.nan, math.nan
    return sum(one.exact for one in scored) / len(scored), sum(one.f1 for one in scored) / len(scored)


def best_threshold(scored: Sequence[Scored], score: str) -> tuple[float, float]:
    """The best average of a score over all thresholds, and the least threshold that reaches it.

    A threshold is the margin of the last question that is answered; where it is best to answer none, one less than all margins.

    Args:
      scored: before a threshold; at least one.
      score: ``exact`` or ``f1``.
    """
    margins = np.array([one.margin for one in scored], np.float64)
    order = np.argsort(margins, kind="stable")
    # What an answer gains over saying that there is none.
    gained = np.array([getattr(one, score) if one.answerable else -float(one.answers) for one in scored])[order]
    totals = sum(not one.answerable for one in scored) + np.concatenate([[0.0], np.cumsum(gained)])
    margins = margins[order]
    cuts = np.concatenate([[margins[0] - 1.0], margins])
    # Questions of one margin are answered together.
    whole = np.append(cuts[:-1] < cuts[1:], True)
    best = int(np.flatnonzero(whole)[totals[whole].argmax()])
    return float(totals[best]) / len(scored), float(cuts[best])
