"""Options of the task ``token_classification``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.config.schema import TaskConfig


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is learnt of rows whose words have a label each, or whose stretches of characters have one."""

    scheme: Literal["BIO", "BIOES"] = "BIO"
    """How labelled stretches of characters become a label for each word. Rows of words keep the labels that they have."""
    label_pieces: Literal["first", "all"] = "first"
    """Which pieces of a word that the tokenizer splits have its label in training; the first one is scored in any case."""
