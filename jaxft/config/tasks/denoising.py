"""Options of the task ``denoising``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.schema import TaskConfig
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(TaskConfig):
    """What is masked in texts, which the decoder writes whole."""

    noise_density: float = 0.3
    """Share of each text's tokens that is masked."""
    mean_span: float = 3.0
    """Tokens of a stretch that one mask stands for, on average; how many follows Poisson's distribution, and may be none."""

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise UserError(f"task.noise_density={self.noise_density}: must lie between 0 and 1")
        if not 1 <= self.mean_span <= 1000:
            raise UserError(f"task.mean_span={self.mean_span}: must lie in 1..1000")
