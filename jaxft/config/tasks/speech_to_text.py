"""Options of the task ``speech_to_text``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxft.config.generation import GenerationConfig
from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What a model learns to write of what it hears."""

    target: str = "text"
    """The column of transcripts; ``data.audio`` is that of sounds. With ``timestamps``, they have times as the tokenizer writes them,
    for instance ``<|0.00|> good morning<|1.20|>``."""
    language: str | None = None
    """Spoken language, a code or an English name; models that know several need it."""
    translate: bool = False
    """Whether transcripts are English translations of what is said."""
    timestamps: bool = False
    """Whether transcripts have times."""
    max_target_length: int = 128
    """Tokens kept of each transcript, with those that it begins with."""
    too_long: Literal["refuse", "cut"] = "refuse"
    """What becomes of sounds longer than the model hears at once: an error that names the first one, or their beginning is kept, and
    counted."""
    label_smoothing: float = 0.0
    """Share of a token's probability that is spread over the whole vocabulary (Szegedy et al. 2016)."""
    generate: bool = True
    """Whether evaluation lets the model write transcripts, and scores them by words (WER) and characters (CER). Without it, their loss
    alone is told."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How transcripts are written: in evaluation, and by whoever uses the exported model (``generation_config.json``)."""

    def __post_init__(self) -> None:
        if self.max_target_length < 1:
            raise UserError(f"task.max_target_length={self.max_target_length}: must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing={self.label_smoothing}: must be 0 or more, and below 1")
        if self.generation.do_sample and self.generate:
            raise UserError(
                "task.generation.do_sample=true: evaluation draws nothing; set it to false, or task.generate too"
            )
