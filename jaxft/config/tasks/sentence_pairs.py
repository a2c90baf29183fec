"""Options of the task ``sentence_pairs``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.config.masking import Masking


@dataclass(frozen=True)
class Config(Masking):
    """What is hidden of pairs of texts, and what pairs are."""

    sentences: Literal["next", "order"] = "next"
    """What becomes of half of the second texts: another document's (BERT: next sentence prediction), or the two are swapped (ALBERT:
    sentence order prediction)."""
