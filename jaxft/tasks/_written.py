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
    "wer": ("wer", "cer", "wer_normalized", "cer_normalized"),
}
"""The numbers of each kind of score, in points of 100."""
_ERRORS = ("wer",)
"""Kinds of scores of which less is better."""
_PACKAGES = {
    "rouge": "rouge_score.rouge_scorer",
    "bleu": "sacrebleu.metrics",
    "chrf": "sacrebleu.metrics",
    "wer": "jiwer",
}


def metrics_of(scores: Sequence[str]) -> dict[str, Direction]:
    """The scalars that texts are scored by, and which way is better."""
    return {metric: "min" if score in _ERRORS else "max" for score in scores for metric in METRICS[score]}


def check_scores(scores: Sequence[str]) -> None:
    """Raises UserError if a score's package is not installed."""
    for score in scores:
        _module(score)


def text_scores(scores: Sequence[str], written: Sequence[str], wanted: Sequence[str]) -> dict[str, object]:
    """The scores of texts against what was wanted, 0 to 100, and by which rules (``scored_by``).

    ROUGE with the Porter stemmer, on letters a to z and digits, sentences of ``rougeLsum`` apart by line breaks; the mean over texts of
    F-measures. BLEU and chrF as sacrebleu computes them over the whole, with its signatures. Errors of words (WER) and characters (CER) as
    jiwer counts them over the whole, of what is written and of what is left of it without case, marks and what stands in brackets.
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
        elif score == "wer":
            found |= _errors(module, written, wanted)
            said[score] = f"jiwer {version('jiwer')}; normalized as Whisper's BasicTextNormalizer does"
        else:
            metric = module.BLEU() if score == "bleu" else module.CHRF()
            found[score] = metric.corpus_score(list(written), [list(wanted)]).score
            said[score] = str(metric.get_signature())
    return found | {"scored_by": said}


def row_scores(scores: Sequence[str], written: Sequence[str], wanted: Sequence[str]) -> tuple[str, list[float]]:
    """What tells how bad single texts are, by name, and of each text: of the first score, its WER, ROUGE-L, or chrF, as BLEU is not for
    single sentences. NaN: nothing was wanted, so that no share of it can be wrong.
    """
    first = scores[0]
    if first == "wer":
        module = _module(first)
        pairs = zip(written, wanted, strict=True)
        return "wer", [100 * module.wer(right, text) if right.strip() else math.nan for text, right in pairs]
    if first == "rouge":
        scorer = _module(first).RougeScorer(["rougeL"], use_stemmer=True)
        pairs = zip(written, wanted, strict=True)
        return "rougeL", [100 * scorer.score(right, text)["rougeL"].fmeasure for text, right in pairs]
    metric = _module(first).CHRF()
    pairs = zip(written, wanted, strict=True)
    return "chrf", [metric.sentence_score(text, [right]).score for text, right in pairs]


def _errors(module: ModuleType, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    plain = BasicTextNormalizer()
    found = {}
    for suffix, change in (("", str), ("_normalized", plain)):
        # A transcript of nothing has no words that could be wrong.
        pairs = [(change(right).strip(), change(text).strip()) for right, text in zip(wanted, written, strict=True)]
        pairs = [pair for pair in pairs if pair[0]]
        for name in ("wer", "cer"):
            rate = (
                getattr(module, name)([right for right, _ in pairs], [text for _, text in pairs]) if pairs else math.nan
            )
            found[f"{name}{suffix}"] = 100 * rate
    return {name: found[name] for name in METRICS["wer"]}


def _module(score: str) -> ModuleType:
    name = _PACKAGES[score]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package, extra = name.partition(".")[0].replace("_", "-"), "audio" if score in _ERRORS else "texts"
        raise UserError(
            f"task.scores: {score} needs {package}, which is not installed: pip install 'jaxft[{extra}]', or leave it out"
        ) from error
