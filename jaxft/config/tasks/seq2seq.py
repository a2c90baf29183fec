"""Options of the task ``seq2seq``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxft.config.generation import GenerationConfig
from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError

Scorer = Literal["rouge", "bleu", "chrf"]


@dataclass(frozen=True)
class Config(TaskConfig):
    """What an encoder-decoder learns to write of a text: a summary, a translation."""

    target: str = "target"
    """The column of texts that are to be written; ``data.text`` is that of their sources."""
    prefix: str = ""
    """Put before each source, for instance ``summarize: ``."""
    source_language: str | None = None
    """What sources are marked with by tokenizers that mark languages (mBART's, NLLB's), as they call it: ``en_XX``. None: as the
    tokenizer's files say."""
    target_language: str | None = None
    """What targets are marked with, and texts that are written begin with."""
    max_target_length: int = 128
    """Tokens kept of each target."""
    label_smoothing: float = 0.0
    """Share of a target's probability that is spread over the whole vocabulary (Szegedy et al. 2016)."""
    generate: bool = True
    """Whether evaluation lets the model write a text for each source, and scores it against the target. Without it, the loss of targets
    alone is told."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How texts are written: in evaluation, and by whoever uses the exported model (``generation_config.json``)."""
    scores: tuple[Scorer, ...] = ("rouge", "bleu", "chrf")
    """What texts are scored by: ROUGE-1, 2, L and Lsum (Lin 2004), BLEU (Papineni et al. 2002), chrF (Popović 2015)."""

    @property
    def languages(self) -> tuple[str | None, str | None]:
        """The languages that the tokenizer marks sources and targets with."""
        return self.source_language, self.target_language

    def __post_init__(self) -> None:
        if self.max_target_length < 1:
            raise UserError(f"task.max_target_length={self.max_target_length}: must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing={self.label_smoothing}: must be 0 or more, and below 1")
        if not self.scores and self.generate:
            raise UserError("task.scores=[]: name one at least, or set task.generate=false")
        if self.generation.do_sample and self.generate:
            raise UserError(
                "task.generation.do_sample=true: evaluation draws nothing; set it to false, or task.generate too"
            )
