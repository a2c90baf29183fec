"""Sound as samples: files that libsndfile reads (WAV, FLAC, Ogg, MP3 and more), one channel, any rate.

Dims: N samples.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from jaxft.data.sources.media import BrokenFile
from jaxft.errors import UserError

LONGEST = 24 * 3600
"""Seconds of one file: what is longer would fill the memory before anything is said."""
RATES = (1000, 768_000)
"""Samples of a second, from and to."""


class Sound(NamedTuple):
    """What a file holds."""

    samples: Float32[np.ndarray, " N"]
    """From -1 to 1; of several channels their mean."""
    rate: int
    """Samples of a second."""
    channels: int
    """How many the file had."""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


def read_sound(source: bytes | Path, where: str) -> Sound:
    """The sound of a file, or of a file's bytes.

    Args:
      where: what a message calls it: its path, or a row's.

    Raises:
      UserError: the file is missing, is none of sound, breaks off, is empty, too long, or has samples that are no numbers.
    """
    soundfile = _package("soundfile", "reads sound")
    if isinstance(source, Path) and not source.is_file():
        raise BrokenFile(f"{where}: there is no such file" if not source.exists() else f"{where}: is not a file")
    if not (source.stat().st_size if isinstance(source, Path) else source):
        raise BrokenFile(f"{where}: is empty, not a file of sound")
    try:
        with soundfile.SoundFile(source if isinstance(source, Path) else io.BytesIO(source)) as file:
            rate, channels, stated = file.samplerate, file.channels, file.frames
            _check_form(rate, channels, stated, where)
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise BrokenFile(f"{where}: cannot be read as sound: {str(error.error_string).rstrip('.')}") from error
    except OSError as error:
        raise BrokenFile(f"{where}: cannot be read: {error.strerror or error}") from error
    if not len(samples):
        raise BrokenFile(f"{where}: has no samples")
    if 0 <= len(samples) < stated < _UNKNOWN:
        raise BrokenFile(f"{where}: breaks off after {len(samples):,} of {stated:,} samples; copy or encode it again")
    one = samples[:, 0] if channels == 1 else samples.mean(1, dtype=np.float32)
    if not np.isfinite(one).all():
        raise BrokenFile(f"{where}: sample {int(np.argmin(np.isfinite(one))) + 1:,} is not a number; encode it again")
    return Sound(np.ascontiguousarray(one), rate, channels)


_UNKNOWN = 1 << 60
"""Frames that a stream states which does not know them."""


def _check_form(rate: int, channels: int, frames: int, where: str) -> None:
    low, high = RATES
    if not low <= rate <= high:
        raise BrokenFile(f"{where}: {rate:,} samples a second: must be from {low:,} to {high:,}")
    if channels > _CHANNELS:
        raise BrokenFile(f"{where}: {channels} channels: must be {_CHANNELS} at most")
    if LONGEST * rate < frames < _UNKNOWN:
        raise BrokenFile(
            f"{where}: {frames / rate / 3600:.1f} hours of sound, at most {LONGEST // 3600} are read; cut it up"
        )


_CHANNELS = 64


def resampled(samples: Float32[np.ndarray, " N"], rate: int, to: int) -> Float32[np.ndarray, " _"]:
    """Samples at another rate, low-passed where there are fewer."""
    if rate == to:
        return samples
    made = _package("soxr", "resamples sound").resample(samples, rate, to)
    return np.asarray(made, np.float32)


def at_rate(sound: Sound, to: int) -> tuple[Float32[np.ndarray, " N"], str | None]:
    """(samples of a sound at a rate, what was changed of it; None: nothing)."""
    changed = []
    if sound.channels > 1:
        changed.append(f"mean of {sound.channels} channels")
    if sound.rate != to:
        changed.append(f"resampled from {sound.rate} to {to}")
    return resampled(sound.samples, sound.rate, to), ", ".join(changed) or None


def _package(name: str, does: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"the package {name} {does}: pip install 'jaxft[audio]'") from error
    except OSError as error:  # libsndfile itself is missing
        raise UserError(f"the package {name} {does}, and cannot be loaded: {error}") from error
