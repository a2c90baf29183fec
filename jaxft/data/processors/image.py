"""Images to pixels: decoded, resized, cropped and normalised as ``preprocessor_config.json`` says, and as `transformers`' image processors
of its PIL backend do (``ViTImageProcessor``, ``DeiTImageProcessor``, ``BitImageProcessor``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8

from jaxft.data.sources.media import ARRAY, BrokenFile, file_of
from jaxft.errors import UserError
from jaxft.files import read_json_object, write_atomic

if TYPE_CHECKING:
    from PIL import Image

FILE = "preprocessor_config.json"
MODES = {1: "L", 3: "RGB"}
"""How an image of so many channels is decoded."""
_MOST_PIXELS = 1 << 28
"""An image of more is refused: it would take a gigabyte to decode."""
_NEAREST, _BILINEAR = 0, 2  # PIL's numbers of filters, which the file has


@dataclass(frozen=True)
class ImageProcessor:
    """How images become arrays [height, width, channels], without a thing left to chance."""

    folder: Path
    """Where it was read; of one that a run made, the folder that it is to lie in."""
    height: int
    width: int
    channels: int
    resize: tuple[int, int] | int | None = None
    """(height, width) that images are resized to first, or how long their shorter edge becomes; None: they are not."""
    crop: bool = False
    """What is beyond ``height`` and ``width`` then is cut off on all sides; what is lacking is black."""
    resample: int = _BILINEAR
    """PIL's number of the filter."""
    scale: float = 1 / 255
    """What values 0..255 are multiplied by."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from that, by channel."""
    std: tuple[float, ...] = (0.5,)
    """What that is divided by."""
    settings: Mapping[str, object] = field(default_factory=dict, hash=False, compare=False)
    """The file as it was read; keys that are not understood are kept."""
    files: tuple[str, ...] = (FILE,)
    max_length: int | None = None
    pad_id: int = 0

    def __call__(self, images: Sequence[Image.Image | bytes | str | Path]) -> dict[str, np.ndarray]:
        """``pixels`` [B, H, W, C] float32 of images, or of files of them: what a model is called with."""
        mode = MODES[self.channels]
        opened = [
            decoded(str(one) if isinstance(one, Path) else one, mode, f"image {i}")
            if isinstance(one, bytes | str | Path)
            else one.convert(mode)
            for i, one in enumerate(images)
        ]
        return {"pixels": self.normalised(np.stack([self.pixels(one) for one in opened]))}

    def normalised(self, pixels: UInt8[np.ndarray, "*B H W C"]) -> Float32[np.ndarray, "*B H W C"]:
        """Pixels as a model reads them."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (pixels.astype(np.float32) * np.float32(self.scale) - mean) / std

    def decoded(self, value: bytes | str, where: str) -> Image.Image:
        """The image in a file's bytes, or in the file that a path names.

        Raises:
          BrokenFile: it cannot be decoded, or is too large.
          UserError: there is no such file.
        """
        return decoded(value, MODES[self.channels], where)

    def pixels(self, image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
        """An image as it is shown to a model that answers."""
        if self.resize is not None:
            image = resized(image, self._resized(image.height, image.width), self.resample)
        found = np.asarray(image, np.uint8).reshape(image.height, image.width, self.channels)
        return centred(found, self.height, self.width) if self.crop else found

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize
        assert self.resize is not None
        short, long = min(height, width), max(height, width)
        longer = int(self.resize * long / short)
        return (longer, self.resize) if width <= height else (self.resize, longer)

    def digest(self) -> str:
        """A hash of everything that pixels depend on."""
        told = (self.height, self.width, self.channels, self.resize, self.crop, self.resample)
        told = (*told, self.scale, self.mean, self.std)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def save(self, folder: Path, max_length: int | None = None) -> None:
        """Writes ``preprocessor_config.json``, which `transformers` reads."""
        del max_length
        write_atomic(folder / FILE, json.dumps(self.as_json(), indent=2) + "\n")

    def as_json(self) -> dict[str, object]:
        """The keys of the file."""
        size = self.resize if self.resize is not None else (self.height, self.width)
        edges = {"height": size[0], "width": size[1]} if isinstance(size, tuple) else {"shortest_edge": size}
        made: dict[str, object] = {
            "image_processor_type": "ViTImageProcessor",
            **self.settings,
            "do_resize": self.resize is not None,
            "size": edges,
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.crop or "do_center_crop" in made:
            made["do_center_crop"] = self.crop
        if self.crop:
            made["crop_size"] = {"height": self.height, "width": self.width}
        if self.channels == 3:  # the reference shows other images as they are
            made["do_convert_rgb"] = True
        made.pop("feature_extractor_type", None)
        return made


def fresh_processor(folder: Path, height: int, width: int, channels: int) -> ImageProcessor:
    """That of a model of random weights: images are resized to what it reads, values lie in -1..1, as ViT's do."""
    _check_possible(channels)
    half = (0.5,) * channels
    return ImageProcessor(folder, height, width, channels, (height, width), mean=half, std=half)


def has_processor(folder: Path) -> bool:
    """Whether a model folder says how its images are made."""
    return (folder / FILE).is_file()


def size_made(folder: Path) -> tuple[int, int] | None:
    """(height, width) of the images that a folder's file makes; None: of any.

    Raises:
      UserError: the file says something that is not supported.
    """
    path = folder / FILE
    said = read_json_object(path)
    key = "crop_size" if said.get("do_center_crop", False) else "size"
    if key == "size" and not said.get("do_resize", True):
        return None
    found = _size(said, key, path)
    return found if isinstance(found, tuple) else None  # whose longer edge is as it comes


def open_processor(
    folder: Path, height: int, width: int, channels: int, before: tuple[int, int, int] | None = None
) -> ImageProcessor:
    """That of a model folder, for a model that reads images of this size.

    Args:
      before: the size that the folder's model reads, where it was changed on request: what the file says is scaled alike.

    Raises:
      UserError: the file is not there, or says something that is not supported, or another size.
    """
    path = folder / FILE
    _check_possible(channels)
    if not has_processor(folder):
        raise UserError(
            f"{folder} has no {FILE}, which says how images are resized and normalised; copy it there, or set data.tokenizer to a "
            "folder that has one"
        )
    said = read_json_object(path)
    resize, crop = _size(said, "size", path), None
    if not said.get("do_resize", True):
        resize = None
    if said.get("do_center_crop", False):
        crop = _size(said, "crop_size", path)
        crop = (crop, crop) if isinstance(crop, int) else crop
    found = crop if crop is not None else resize
    if before is not None and before[:2] != (height, width) and isinstance(found, tuple) and found != (height, width):
        resize, found = _scaled(resize, height / found[0], width / found[1]), (height, width)
        crop = None if crop is None else found
    if found is not None and found != (height, width):
        made = "x".join(map(str, found)) if isinstance(found, tuple) else f"{found} by whatever they are long"
        raise UserError(
            f"{path}: makes images of {made} pixels, the model reads {height}x{width}: set model.arch.image_size, or correct the file"
        )
    rescale, normal = said.get("do_rescale", True), said.get("do_normalize", True)
    return ImageProcessor(
        folder,
        height,
        width,
        channels,
        resize,
        crop is not None,
        _filter(said, path),
        float(_number(said, "rescale_factor", 1 / 255, path)) if rescale else 1.0,
        _by_channel(said, "image_mean", channels, path) if normal else (0.0,) * channels,
        _by_channel(said, "image_std", channels, path) if normal else (1.0,) * channels,
        said,
    )


def _check_possible(channels: int) -> None:
    if importlib.util.find_spec("PIL") is None:
        raise UserError("the package pillow reads images: pip install 'jaxft[images]'")
    if channels not in MODES:
        raise UserError(f"images of {channels} channels are not supported, only of 1 (grey) or 3 (red, green, blue)")


def decoded(value: bytes | str, mode: str, where: str) -> Image.Image:
    """An image in PIL's ``mode``; animated ones are their first picture.

    Raises:
      BrokenFile: it cannot be decoded, or is too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    data = file_of(value, where)
    name = value if isinstance(value, str) else where
    try:
        if data.startswith(ARRAY):
            array = np.load(io.BytesIO(data), allow_pickle=False)
            image = Image.fromarray(array[..., 0] if array.shape[-1:] == (1,) and array.ndim == 3 else array)
        else:
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > _MOST_PIXELS:
            raise BrokenFile(f"{name}: an image of {image.width}x{image.height} pixels, over {_MOST_PIXELS:,}")
        image.load()
        if image.mode.startswith(("I", "F")):
            raise BrokenFile(
                f"{name}: pixels of more than 8 bits ({image.mode}), which would be clipped; convert it to 8 bits"
            )
        image = ImageOps.exif_transpose(image)  # as cameras were held
        return image if image.mode == mode else image.convert(mode)
    except UnidentifiedImageError as error:
        raise BrokenFile(f"{name}: is no image that can be read ({len(data):,} bytes)") from error
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise BrokenFile(f"{name}: a broken image: {error}") from error


def size_of(data: bytes) -> tuple[int, int] | None:
    """(height, width) that the beginning of a file states, before the image is turned as its EXIF data say; None: of no image."""
    from PIL import Image

    try:
        if data.startswith(ARRAY):
            height, width = np.load(io.BytesIO(data), allow_pickle=False).shape[:2]
            return height, width
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def resized(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """An image of (height, width) pixels."""
    from PIL import Image

    if (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), Image.Resampling(resample))


def centred(image: UInt8[np.ndarray, "h w C"], height: int, width: int) -> UInt8[np.ndarray, "H W C"]:
    """The middle of an image; what is lacking is black."""
    lacking = [max(0, wanted - there) for wanted, there in zip((height, width), image.shape, strict=False)]
    if any(lacking):
        before = [math.ceil(one / 2) for one in lacking]
        around = [(first, one - first) for first, one in zip(before, lacking, strict=True)]
        image = np.pad(image, (*around, (0, 0)))
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _size(said: Mapping[str, object], key: str, path: Path) -> tuple[int, int] | int | None:
    """(height, width), or the length of the shorter edge."""
    value = said.get(key)
    if value is None:
        return None
    if isinstance(value, int):  # as older files say: a square
        return (value, value)
    if isinstance(value, Mapping):
        if set(value) == {"height", "width"}:
            height, width = value["height"], value["width"]
            if isinstance(height, int) and isinstance(width, int):
                return (height, width)
        edge = value.get("shortest_edge")
        if set(value) == {"shortest_edge"} and isinstance(edge, int):
            return edge
    raise UserError(f"{path}: {key} is {value!r:.80}; expected height and width, or shortest_edge")


def _scaled(size: tuple[int, int] | int | None, by_height: float, by_width: float) -> tuple[int, int] | int | None:
    if isinstance(size, tuple):
        return round(size[0] * by_height), round(size[1] * by_width)
    return None if size is None else round(size * max(by_height, by_width))


def _filter(said: Mapping[str, object], path: Path) -> int:
    value = said.get("resample", _BILINEAR)
    if not isinstance(value, int) or not _NEAREST <= value <= 5:
        raise UserError(f"{path}: resample is {value!r:.40}; expected the number of one of PIL's filters, 0..5")
    return value


def _number(said: Mapping[str, object], key: str, usual: float, path: Path) -> float:
    value = said.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {key} is {value!r:.40}; expected a number")
    return value


def _by_channel(said: Mapping[str, object], key: str, channels: int, path: Path) -> tuple[float, ...]:
    value = said.get(key, [0.5] * channels)
    values: Sequence[object] = value if isinstance(value, list) else [value] * channels
    found = tuple(_number({key: one}, key, 0.0, path) for one in values)
    if len(found) != channels:
        raise UserError(f"{path}: {key} has {len(found)} numbers for {channels} channels")
    if key == "image_std" and 0 in found:
        raise UserError(f"{path}: image_std has a 0, which nothing can be divided by")
    return found
