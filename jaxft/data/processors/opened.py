"""What turns rows into arrays, opened from a model folder: whichever kind the model's inputs ask for."""

from __future__ import annotations

import shutil
from pathlib import Path

from jaxft.data.batch import Fields
from jaxft.data.processors import image, speech
from jaxft.data.processors.contract import AS_FILES_SAY, Languages, Processor
from jaxft.data.processors.speech import SpeechProcessor
from jaxft.data.processors.tokenizer import Tokenizer, has_tokenizer
from jaxft.data.processors.tokenizer_saving import copy_files
from jaxft.errors import UserError

FILES = {"text": "tokenizer files", "image": image.FILE, "audio": f"tokenizer files and {speech.FILE}"}
"""What a folder has beside the weights, by what its model reads."""


def reads_images(inputs: Fields) -> bool:
    """Whether a model of these inputs reads images."""
    return "pixels" in inputs


def hears(inputs: Fields) -> bool:
    """Whether a model of these inputs hears frames of sound."""
    return "frames" in inputs


def has_processor(folder: Path, inputs: Fields) -> bool:
    """Whether a folder has the files that a model of these inputs needs."""
    if hears(inputs):
        return speech.has_processor(folder)
    return image.has_processor(folder) if reads_images(inputs) else has_tokenizer(folder)


def open_processor(
    folder: Path,
    max_length: int | None,
    inputs: Fields,
    model_type: str | None,
    stored: Fields | None = None,
    languages: Languages = AS_FILES_SAY,
) -> Processor:
    """What a folder says of how rows become arrays.

    Args:
      max_length: tokens kept per text; None: all.
      inputs: of the model's forward pass.
      model_type: of the model, for tokenizers whose files do not say what they are.
      stored: inputs of the model as its folder has it, where those were changed on request: images then follow.
      languages: that a tokenizer marks texts with, where not as its files say.

    Raises:
      UserError: the files are not there, or cannot be read.
    """
    if reads_images(inputs):
        before = None if stored is None else _image_size(stored)
        return image.open_processor(folder, *_image_size(inputs), before)
    if hears(inputs):
        frames, bins = (axis for axis in inputs["frames"].axes[1:] if isinstance(axis, int))
        return speech.open_processor(folder, max_length, frames, bins, model_type)
    return Tokenizer(folder, max_length, model_type=model_type, languages=languages)


def write_processor(tokenizer: Tokenizer | None, source: Path, target: Path, inputs: Fields) -> None:
    """Writes the files that a model of these inputs needs: a tokenizer's, or copies of those that it has, and copies of the others."""
    if tokenizer is not None:
        tokenizer.save(target)
    elif not reads_images(inputs):
        copy_files(source, target)
    for name in (image.FILE, speech.SETTINGS) if reads_images(inputs) or hears(inputs) else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def fresh_processor(folder: Path, inputs: Fields) -> Processor:
    """That of a model of random weights, where no folder says how its images are made.

    Raises:
      UserError: the model reads texts, which need a tokenizer.
    """
    if not reads_images(inputs):
        raise UserError("data.tokenizer is not set, and there is no model.init to take it from")
    return image.fresh_processor(folder, *_image_size(inputs))


def as_text(processor: Processor) -> Tokenizer:
    """The processor, if it reads texts.

    Raises:
      UserError: it reads something else.
    """
    if isinstance(processor, SpeechProcessor):
        return processor.tokenizer
    if not isinstance(processor, Tokenizer):
        raise UserError(f"the model ({processor.folder}) reads no texts, which this needs")
    return processor


def _image_size(inputs: Fields) -> tuple[int, int, int]:
    height, width, channels = (axis for axis in inputs["pixels"].axes[1:] if isinstance(axis, int))
    return height, width, channels
