"""What a model of speech reads of its folder: how sound becomes frames, and how transcripts become tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from jaxft.config.speech import SpeechTokens
from jaxft.data.processors.log_mel import LogMel
from jaxft.data.processors.sound import at_rate, read_sound
from jaxft.data.processors.tokenizer import Tokenizer, has_tokenizer
from jaxft.data.sources.media import ARRAY, file_of
from jaxft.errors import UserError
from jaxft.files import read_json_object, write_atomic

FILE = "preprocessor_config.json"
SETTINGS = "generation_config.json"


@dataclass(frozen=True)
class SpeechProcessor:
    """Sound to frames, and texts to tokens."""

    tokenizer: Tokenizer
    log_mel: LogMel
    settings: Mapping[str, object] = field(default_factory=dict, hash=False, compare=False)
    """Its generation_config.json; empty where there is none."""
    start: int = 0
    """What every transcript begins with, where that does not say."""

    @property
    def folder(self) -> Path:
        """Where it was read."""
        return self.tokenizer.folder

    @property
    def files(self) -> tuple[str, ...]:
        """The names that its files may have."""
        return (FILE, *self.tokenizer.files)

    @property
    def max_length(self) -> int | None:
        """Tokens kept of a transcript; None: all."""
        return self.tokenizer.max_length

    @property
    def pad_id(self) -> int:
        """What transcripts are padded with."""
        return self.tokenizer.pad_id

    @property
    def tokens(self) -> SpeechTokens | None:
        """What transcripts begin with; None: the folder does not say, and its model knows one language and no times."""
        if "eos_token_id" not in self.settings:
            return None
        return SpeechTokens.from_json(self.settings, self.start, str(self.folder / SETTINGS))

    def frames(self, value: bytes | str, where: str) -> Float32[np.ndarray, "P C"]:
        """The frames of one stretch of sound.

        Raises:
          UserError: it cannot be read.
        """
        return self.log_mel(self.samples(value, where)[0])

    def samples(self, value: bytes | str, where: str) -> tuple[Float32[np.ndarray, " N"], str | None]:
        """The samples of a file, or of the one that a path names, at the rate that the model hears; and what was changed for that."""
        data = file_of(value, where)
        if data.startswith(ARRAY):
            raise UserError(f"{where}: samples without a rate; give files of sound, or their bytes")
        return at_rate(read_sound(data, value if isinstance(value, str) else where), self.log_mel.sampling_rate)

    def digest(self) -> str:
        """A hash of everything that frames and tokens depend on."""
        return hashlib.sha256(repr((self.tokenizer.digest(), self.log_mel)).encode()).hexdigest()

    def save(self, folder: Path, max_length: int | None = None) -> None:
        """Writes the files of the tokenizer, and ``preprocessor_config.json``; how long transcripts may be stays as it was stated."""
        del max_length  # of texts that a model reads
        self.tokenizer.save(folder)
        write_atomic(folder / FILE, json.dumps(self.log_mel.to_json(), indent=2) + "\n")


def has_processor(folder: Path) -> bool:
    """Whether a folder has a tokenizer and says how frames are made."""
    return has_tokenizer(folder) and (folder / FILE).is_file()


def open_processor(
    folder: Path, max_length: int | None, frames: int, bins: int, model_type: str | None
) -> SpeechProcessor:
    """That of a model folder; where it does not say how frames are made, as Whisper does, of as many seconds as the model hears.

    Raises:
      UserError: there is no tokenizer, or frames are made otherwise than the model reads them.
    """
    tokenizer = Tokenizer(folder, max_length, model_type=model_type)
    path = folder / FILE
    if path.is_file():
        made = LogMel.from_json(read_json_object(path), str(path))
    else:
        usual = LogMel(bins)
        seconds, rest = divmod(frames * usual.hop_length, usual.sampling_rate)
        if rest:
            raise UserError(
                f"a model that reads {frames} frames hears no whole number of seconds: set model.arch.max_source_positions to a multiple "
                f"of {usual.sampling_rate // usual.hop_length // 2}"
            )
        made = LogMel(bins, chunk_length=seconds)
    if (made.frames, made.feature_size) != (frames, bins):
        raise UserError(
            f"{path}: makes {made.frames} frames of {made.feature_size} bins, the model reads {frames} of {bins}"
        )
    said = read_json_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    return SpeechProcessor(tokenizer, made, said)
