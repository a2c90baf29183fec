"""Options of the task ``image_classification``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.config.tasks.classification import Config as Classification
from jaxft.errors import UserError


@dataclass(frozen=True)
class Config(Classification):
    """What is learnt of images with one label each. Random changes follow from (seed, epoch, image) alone; none are made where images are
    scored."""

    crop: Literal["none", "resized", "padded"] = "none"
    """Which part of a training image is shown. ``none``: as when a model answers. ``resized``: a part of random size and shape, resized
    (Szegedy et al. 2015). ``padded``: the image moved by up to ``crop_padding`` pixels each way."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """With ``resized``: the least and the greatest share of the image."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """With ``resized``: the least and the greatest width of the part by its height."""
    crop_padding: int = 4
    """With ``padded``: pixels."""
    flip: float = 0.0
    """Probability that left and right are exchanged; 0.5 where this changes no label."""
    augment: Literal["none", "trivial", "rand"] = "none"
    """``trivial``: one random operation of random strength (TrivialAugment, Müller and Hutter 2021). ``rand``: ``rand_operations`` random
    ones of strength ``rand_magnitude`` (RandAugment, Cubuk et al. 2020)."""
    rand_operations: int = 2
    rand_magnitude: int = 9
    """0 to 30."""
    erase: float = 0.0
    """Probability that a random rectangle is replaced by noise (Zhong et al. 2020)."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018): each image of a batch is mixed with another, and so is the loss; the share is drawn from
    Beta(alpha, alpha). 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019): a rectangle of each image is that of another. With ``mixup``, each batch has one of the two,
    drawn by chance. 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"task.{name}={getattr(self, name)}: a probability must lie in 0..1")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < 1e6:
                raise UserError(f"task.{name}={getattr(self, name)}: must not be negative")
        least, most = self.crop_scale
        if not 0 < least <= most <= 1:
            raise UserError(f"task.crop_scale={list(self.crop_scale)}: two shares of 0..1, the lesser first")
        narrow, wide = self.crop_ratio
        if not 0 < narrow <= wide < 1e3:
            raise UserError(f"task.crop_ratio={list(self.crop_ratio)}: two widths by height above 0, the lesser first")
        if not 0 <= self.crop_padding <= 1024:
            raise UserError(f"task.crop_padding={self.crop_padding}: must lie in 0..1024")
        if not 1 <= self.rand_operations <= 14 or not 0 <= self.rand_magnitude <= 30:
            raise UserError(
                f"task.rand_operations={self.rand_operations}, task.rand_magnitude={self.rand_magnitude}: must lie in 1..14 and 0..30"
            )
