"""Scores of texts that a model has written, by the field's own packages."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType

from jaxft.errors import UserError
from jaxft.tasks.contract import Direction

METRICS: dict[str, tuple[str, ...]] = {
    "rouge": ("rougeL", "rouge1", "rouge2", "rougeLsum"),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
}
"""The numbers of each kind of score; all are shares or points of 100, and more is better."""
_PACKAGES = {"rouge": "rouge_score.rouge_scorer", "bleu": "sacrebleu.metrics", "chrf": "sacrebleu.metrics"}


def metrics_of(scores: Sequence[str]) -> dict[str, Direction]:
    """The scalars that texts are scored by, and which way is better."""
    return {metric: "max" for score in scores for metric in METRICS[score]}


def check_scores(scores: Sequence[str]) -> None:
    """Raises UserError if a score's package is not installed."""
    for score in scores:
        _module(score)


def text_scores(scores: Sequence[str], written: Sequence[str], wanted: Sequence[str]) -> dict[str, object]:
    """The scores of texts against what was wanted, 0 to 100, and by which rules (``scored_by``).

    ROUGE with the Porter stemmer, on letters a to z and digits, sentences of ``rougeLsum`` apart by line breaks; the mean over texts of
    F-measures. BLEU and chrF as sacrebleu computes them over the whole, with its signatures.
    """
    if not written:
        return dict.fromkeys(metrics_of(scores), math.nan)
    found: dict[str, object] = {}
    said: dict[str, str] = {}
    for score in scores:
        module = _module(score)
        if score == "rouge":
            scorer = module.RougeScorer(list(METRICS["rouge"]), use_stemmer=True)
            each = [scorer.score(right, text) for right, text in zip(wanted, written, strict=True)]
            found |= {name: 100 * sum(one[name].fmeasure for one in each) / len(each) for name in METRICS["rouge"]}
            said[score] = f"rouge-score {version('rouge-score')}, stemmer"
        else:
            metric = module.BLEU() if score == "bleu" else module.CHRF()
            found[score] = metric.corpus_score(list(written), [list(wanted)]).score
            said[score] = str(metric.get_signature())
    return found | {"scored_by": said}


def _module(score: str) -> ModuleType:
    name = _PACKAGES[score]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise UserError(
            f"task.scores: {score} needs {package}, which is not installed: pip install 'jaxft[texts]', or leave it out"
        ) from error
