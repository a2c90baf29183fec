"""Images and sounds as rows: cells that hold them or name their files, and folders of such files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxft.errors import UserError

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
SOUNDS = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au"})
MEDIA = IMAGES | SOUNDS
ARRAY = b"\x93NUMPY"
"""What the bytes of an array begin with that stands for a file (``numpy.save``)."""
_MOST_BYTES = 1 << 30
V = TypeVar("V")


class BrokenFile(UserError):
    """A file that is not there, or that holds no image or sound."""


def media_value(value: object, name: str, where: str) -> bytes | str | None:
    """What a cell of a column of images or sounds holds: bytes of a file, the path of one, or None.

    Raises:
      UserError: it holds anything else.
    """
    if isinstance(value, Mapping):  # as the datasets library stores them
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.float32, np.float64, np.int16):
        file = io.BytesIO()
        np.save(file, value)
        return file.getvalue()
    if isinstance(value, bytes | str):
        return value
    raise UserError(
        f"{where}: column {str(name)!r} holds a {type(value).__name__}; expected the path of a file, or what such a file holds"
    )


def is_media(name: str) -> bool:
    """Whether a file's name says that it is an image or a sound."""
    return Path(name).suffix.lower() in MEDIA


def beside(value: V, folder: Path) -> V | str:
    """A cell; if it is the path of a file, one that can be opened from anywhere."""
    if not isinstance(value, str) or not value:
        return value
    return str(folder / Path(value).expanduser())


def file_of(value: bytes | str, where: str) -> bytes:
    """The bytes that a cell holds, or those of the file that it names.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    if isinstance(value, bytes):
        return value
    try:
        path = Path(value)
        if path.stat().st_size > _MOST_BYTES:
            raise BrokenFile(f"{value}: a file of over {_MOST_BYTES >> 30} GiB ({where})")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise BrokenFile(f"{where}: the file {value} {reason}") from error


def media_in(folder: Path) -> list[Path]:
    """The images and sounds in a folder, in the order of their names."""
    inside = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in inside if file.suffix.lower() in MEDIA and file.is_file())
