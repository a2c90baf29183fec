"""Scores of a split as reports show them: which stand at the top, what they are called, what else a task may tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypedDict, cast

from jaxft.files import JsonObject

SHOWN = (
    ("wer", "WER"),
    ("cer", "CER"),
    ("wer_normalized", "WER normalized"),
    ("cer_normalized", "CER normalized"),
    ("rougeL", "ROUGE-L"),
    ("rouge1", "ROUGE-1"),
    ("rouge2", "ROUGE-2"),
    ("bleu", "BLEU"),
    ("chrf", "chrF"),
    ("accuracy", "accuracy"),
    ("top5_accuracy", "top-5 accuracy"),
    ("exact_match", "exact match"),
    ("macro_f1", "macro F1"),
    ("micro_f1", "micro F1"),
    ("weighted_f1", "weighted F1"),
    ("mcc", "MCC"),
    ("samples_f1", "samples F1"),
    ("hamming_loss", "Hamming loss"),
    ("f1", "F1"),
    ("precision", "entity precision"),
    ("recall", "entity recall"),
    ("macro_entity_f1", "macro entity F1"),
    ("HasAns_exact", "exact match with answer"),
    ("HasAns_f1", "F1 with answer"),
    ("NoAns_exact", "right without answer"),
    ("best_exact", "best exact match"),
    ("best_exact_threshold", "threshold of that"),
    ("best_f1", "best F1"),
    ("best_f1_threshold", "threshold of that"),
    ("map", "MAP"),
    ("auroc", "AUROC"),
    ("average_precision", "average precision"),
    ("macro_auroc", "macro AUROC"),
    ("macro_average_precision", "macro average precision"),
    ("ece", "calibration error"),
    ("brier", "Brier"),
    ("macro_ece", "macro calibration error"),
    ("macro_brier", "macro Brier"),
    ("spearman", "Spearman"),
    ("pearson", "Pearson"),
    ("mse", "MSE"),
    ("rmse", "RMSE"),
    ("mae", "MAE"),
    ("r2", "R2"),
    ("loss", "loss"),
    ("perplexity", "perplexity"),
    ("bits_per_token", "bits a token"),
    ("bits_per_byte", "bits a byte"),
)
"""Names of scores as they are shown, in the order in which they are."""


class Known(TypedDict, total=False):
    """What is shown of scores besides the numbers of the headline, where a task has it."""

    rows: int
    classes: dict[str, dict[str, float]]
    """Precision, recall, F1 and rows of each."""
    confusion: list[list[int]]
    positive: str
    best_threshold: dict[str, float] | None
    intervals: dict[str, list[float]]
    """Where 95 % of resamples of the rows have a score."""
    calibration: JsonObject
    """``bins`` of probabilities; ``temperature``, None if there is none, and scores ``..._at_temperature``."""
    sources: dict[str, dict[str, float]]
    """Scores of each source of corpora."""
    thresholds: JsonObject
    """``labels``, each with the ``threshold`` of its highest F1."""


class Score(NamedTuple):
    """A score that stands at the top of a report."""

    name: str
    shown: str
    """What it is called there."""
    value: float


def headline(metrics: Mapping[str, object]) -> list[Score]:
    """The scores that stand at the top."""
    ranks = [(name, name.upper() if name.startswith(("mrr", "ndcg")) else name) for name in metrics if "@" in name]
    entities = "macro_entity_f1" in metrics
    return [
        Score(name, "entity F1" if entities and name == "f1" else shown, cast(float, metrics[name]))
        for name, shown in (*ranks, *SHOWN)
        if name in metrics
    ]
