"""Random changes of training images, each a pure function of the image and of a generator of random numbers.

Crops: Szegedy et al. 2015 (resized), He et al. 2016 (padded). RandAugment: Cubuk et al. 2020; TrivialAugment, wide: Müller and Hutter 2021;
operations and strengths of both as torchvision has them. Random erasing: Zhong et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

from jaxft.data.processors.image import ImageProcessor, resized

if TYPE_CHECKING:
    from PIL import Image

Rng = np.random.Generator
Operation = Callable[["Image.Image", float], "Image.Image"]
_BINS = 31
"""Strengths that an operation may have."""
_TRIES = 10
"""Places that are drawn for a part of an image before the whole is taken."""


@dataclass(frozen=True)
class Augmentation:
    """What training images go through, in this order."""

    crop: Literal["none", "resized", "padded"] = "none"
    """``resized``: a part of random size and shape, resized. ``padded``: as when nothing is random, moved by a few pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """With ``resized``: the least and the greatest share of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The least and the greatest width of the part by its height."""
    crop_padding: int = 4
    """With ``padded``: pixels by which it may move."""
    flip: float = 0.0
    """Probability that left and right are exchanged."""
    augment: Literal["none", "trivial", "rand"] = "none"
    operations: int = 2
    """With ``rand``: how many, one after the other."""
    magnitude: int = 9
    """Their strength, 0 to 30."""
    erase: float = 0.0
    """Probability that a rectangle is replaced by noise."""

    def changed(self, image: Image.Image, processor: ImageProcessor, rng: Rng) -> UInt8[np.ndarray, "H W C"]:
        """A training image."""
        if self.crop == "resized":
            image = random_part(image, self.crop_scale, self.crop_ratio, rng)
            image = resized(image, (processor.height, processor.width), processor.resample)
        if self.flip and rng.random() < self.flip:
            from PIL import Image as pil

            image = image.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
        if self.augment == "trivial":
            image = trivial_augment(image, rng)
        elif self.augment == "rand":
            image = rand_augment(image, self.operations, self.magnitude, rng)
        pixels = _array(image) if self.crop == "resized" else processor.pixels(image)
        if self.crop == "padded":
            pixels = moved(pixels, self.crop_padding, rng)
        if self.erase and rng.random() < self.erase:
            pixels = erased(pixels, rng)
        return pixels


def _array(image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
    found = np.asarray(image, np.uint8)
    return found[..., None] if found.ndim == 2 else found


def random_part(image: Image.Image, scale: tuple[float, float], ratio: tuple[float, float], rng: Rng) -> Image.Image:
    """A part of random size and shape; after ten that do not fit, the largest one in the middle whose shape is allowed."""
    width, height = image.size
    found = _place(height, width, scale, ratio, rng)
    if found is None:
        shape = min(max(width / height, ratio[0]), ratio[1])
        wide, high = (width, round(width / shape)) if width / height < shape else (round(height * shape), height)
        wide, high = min(wide, width), min(high, height)
        found = ((height - high) // 2, (width - wide) // 2, high, wide)
    top, left, high, wide = found
    return image.crop((left, top, left + wide, top + high))


def _place(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: Rng
) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of a random rectangle; None: ten did not fit."""
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        wide, high = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < high <= height:
            return int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1)), high, wide
    return None


def moved(pixels: UInt8[np.ndarray, "H W C"], most: int, rng: Rng) -> UInt8[np.ndarray, "H W C"]:
    """An image moved by up to so many pixels each way; what comes in is black."""
    height, width, _ = pixels.shape
    top, left = (int(one) for one in rng.integers(2 * most + 1, size=2))
    return np.pad(pixels, ((most, most), (most, most), (0, 0)))[top : top + height, left : left + width]


def erased(pixels: UInt8[np.ndarray, "H W C"], rng: Rng) -> UInt8[np.ndarray, "H W C"]:
    """An image with noise in a random rectangle of 2 % to a third of it."""
    found = _place(pixels.shape[0], pixels.shape[1], (0.02, 1 / 3), (0.3, 1 / 0.3), rng)
    if found is None:
        return pixels
    top, left, high, wide = found
    changed = pixels.copy()
    changed[top : top + high, left : left + wide] = rng.integers(0, 256, (high, wide, pixels.shape[2]), np.uint8)
    return changed


def trivial_augment(image: Image.Image, rng: Rng) -> Image.Image:
    """One operation of random strength."""
    names = sorted(_WIDE)
    name = names[int(rng.integers(len(names)))]
    return _applied(image, name, _WIDE[name](image) * int(rng.integers(_BINS)) / (_BINS - 1), rng)


def rand_augment(image: Image.Image, operations: int, magnitude: int, rng: Rng) -> Image.Image:
    """So many operations of one strength."""
    names = sorted(_USUAL)
    for _ in range(operations):
        name = names[int(rng.integers(len(names)))]
        image = _applied(image, name, _USUAL[name](image) * magnitude / (_BINS - 1), rng)
    return image


def _applied(image: Image.Image, name: str, strength: float, rng: Rng) -> Image.Image:
    operation, signed = _OPERATIONS[name]
    if signed and rng.random() < 0.5:
        strength = -strength
    return operation(image, strength)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _sheared(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, 1, strength, 0, 0, 1, 0)


def _sheared_down(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, 1, 0, 0, strength, 1, 0)


def _enhanced(kind: str) -> Operation:
    def made(image: Image.Image, strength: float) -> Image.Image:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(image).enhance(1 + strength)

    return made


def _posterized(image: Image.Image, strength: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(strength))


def _solarized(image: Image.Image, strength: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, round(255 - strength))


def _by_itself(name: str) -> Operation:
    def made(image: Image.Image, strength: float) -> Image.Image:
        from PIL import ImageOps

        del strength
        return getattr(ImageOps, name)(image)

    return made


_OPERATIONS: Mapping[str, tuple[Operation, bool]] = {
    "identity": (lambda image, strength: image, False),
    "shear_x": (_sheared, True),
    "shear_y": (_sheared_down, True),
    "translate_x": (lambda image, strength: _affine(image, 1, 0, round(strength), 0, 1, 0), True),
    "translate_y": (lambda image, strength: _affine(image, 1, 0, 0, 0, 1, round(strength)), True),
    "rotate": (lambda image, strength: image.rotate(strength), True),
    "brightness": (_enhanced("Brightness"), True),
    "color": (_enhanced("Color"), True),
    "contrast": (_enhanced("Contrast"), True),
    "sharpness": (_enhanced("Sharpness"), True),
    "posterize": (_posterized, False),
    "solarize": (_solarized, False),
    "auto_contrast": (_by_itself("autocontrast"), False),
    "equalize": (_by_itself("equalize"), False),
}
"""By name, an operation, and whether its strength has a random sign."""

Greatest = Callable[["Image.Image"], float]
_SAME: Mapping[str, Greatest] = dict.fromkeys(("identity", "auto_contrast", "equalize"), lambda image: 0.0)
_WIDE: Mapping[str, Greatest] = {
    **_SAME,
    **dict.fromkeys(("shear_x", "shear_y"), lambda image: 0.99),
    **dict.fromkeys(("translate_x", "translate_y"), lambda image: 32.0),
    "rotate": lambda image: 135.0,
    **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), lambda image: 0.99),
    "posterize": lambda image: 6.0,
    "solarize": lambda image: 255.0,
}
"""The greatest strength of each operation of TrivialAugment."""
_USUAL: Mapping[str, Greatest] = {
    **_SAME,
    **dict.fromkeys(("shear_x", "shear_y"), lambda image: 0.3),
    "translate_x": lambda image: 150 / 331 * image.width,
    "translate_y": lambda image: 150 / 331 * image.height,
    "rotate": lambda image: 30.0,
    **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), lambda image: 0.9),
    "posterize": lambda image: 4.0,
    "solarize": lambda image: 255.0,
}
"""The same of RandAugment."""
