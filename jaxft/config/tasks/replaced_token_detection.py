"""Options of the task ``replaced_token_detection``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.config.masking import Masking
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(Masking):
    """What the generator is asked for, and how much the discriminator's loss counts."""

    discriminator_weight: float = 50.0
    """What the discriminator's loss is multiplied by before the generator's is added (Clark et al. 2020)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.discriminator_weight > 0:
            raise UserError(f"task.discriminator_weight={self.discriminator_weight}: must be above 0")
