"""Log-mel frames of sound, as the reference's extractor makes them (`WhisperFeatureExtractor`): the values of its float64 path.

A stretch's frames are short-time Fourier transforms with Hann windows, their power summed up in mel bins (Slaney 1998), its logarithm
clipped to eight powers of ten below the loudest.

Dims: N samples, P frames, C bins of frequency, W samples of a window.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from jaxft.errors import UserError
from jaxft.files import JsonObject

_HIGHEST = 8000.0
"""Hertz at which the last bin ends, whatever the sampling rate."""
_FAINTEST, _RANGE = 1e-10, 8.0
_BLOCK = 500
"""Frames that are transformed at once: what they take fits into a core's cache."""
_CLASS = "WhisperFeatureExtractor"


@dataclass(frozen=True)
class LogMel:
    """Settings, under the names of preprocessor_config.json, and what is made by them."""

    feature_size: int = 80
    """Bins of frequency, C."""
    sampling_rate: int = 16000
    """Samples of a second."""
    hop_length: int = 160
    """Samples from one frame to the next."""
    chunk_length: int = 30
    """Seconds of a stretch."""
    n_fft: int = 400
    """Samples of a window, W."""
    padding_value: float = 0.0
    """What shorter sound is filled up with."""

    def __post_init__(self) -> None:
        for name in ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MOST:
                raise UserError(f"{name}={value!r}: must be a whole number from 1 to {_MOST:,}")
        if self.n_fft % 2:
            raise UserError(f"n_fft={self.n_fft}: must be even")
        if self.samples < self.hop_length:
            raise UserError(f"hop_length={self.hop_length}: a stretch of {self.samples} samples has no frame")
        if not isinstance(self.padding_value, int | float) or not math.isfinite(self.padding_value):
            raise UserError(f"padding_value={self.padding_value!r}: must be a finite number")

    @classmethod
    def from_json(cls, tree: Mapping[str, object], where: str) -> LogMel:
        """The settings of a preprocessor_config.json.

        Raises:
          UserError: they are another extractor's, out of range, or make other frames each time.
        """
        kind = tree.get("feature_extractor_type", _CLASS)
        if kind != _CLASS:
            raise UserError(f"{where}: feature_extractor_type={kind!r} is not supported; {_CLASS} is")
        for name, usual in (("dither", 0.0), ("do_normalize", False)):
            if tree.get(name, usual) not in (usual, None):
                raise UserError(f"{where}: {name}={tree[name]!r} is not supported; set it to {str(usual).lower()}")
        names = [field.name for field in dataclasses.fields(cls)]
        stated = {name: tree[name] for name in names if tree.get(name) is not None}
        try:
            return dataclasses.replace(cls(), **stated)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def to_json(self) -> JsonObject:
        """The reference's preprocessor_config.json."""
        stated: JsonObject = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        more = {"nb_max_frames": self.frames, "n_samples": self.samples, "dither": 0.0}
        return {"feature_extractor_type": _CLASS, **stated, **more, "return_attention_mask": False}

    @property
    def samples(self) -> int:
        """Samples of a stretch."""
        return self.chunk_length * self.sampling_rate

    @property
    def frames(self) -> int:
        """Frames of a stretch, P."""
        return self.samples // self.hop_length

    def __call__(self, waveform: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, "P C"]:
        """The frames of one stretch: longer sound is cut, shorter sound filled up."""
        kept = waveform[: self.samples]
        if self.padding_value:
            kept = np.pad(kept, (0, self.samples - len(kept)), constant_values=self.padding_value)
        return self._made(kept, self.samples)

    def whole(self, waveform: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, "_ C"]:
        """The frames of sound as long as it is, of which the last may be a part: N / hop_length of them."""
        return self._made(waveform, len(waveform))

    def _made(self, waveform: Float32[np.ndarray, " N"], length: int) -> Float32[np.ndarray, "_ C"]:
        """The frames of a waveform with silence behind it, up to a length."""
        count = length // self.hop_length
        # What silence gives is known.
        power = np.full((count, self.feature_size), _FAINTEST, np.float32)
        if count == 0:
            return power
        for first, block in self._blocks(waveform, length, count):
            power[first : first + len(block)] = block
        logs = np.log10(np.maximum(power, _FAINTEST, out=power), out=power)
        np.maximum(logs, logs.max() - np.float32(_RANGE), out=logs)
        logs += np.float32(4)
        logs /= np.float32(4)
        return logs

    def _blocks(
        self, waveform: Float32[np.ndarray, " N"], length: int, count: int
    ) -> Iterator[tuple[int, Float32[np.ndarray, "_ C"]]]:
        """(number of the first frame, power in each bin) of the frames up to the last that has sound in it."""
        side, size = self.n_fft // 2, self.n_fft
        loud = np.flatnonzero(waveform)
        if not loud.size:
            return
        last = int(loud[-1])
        if last < length - 1 - side:  # nor is there sound in what is reflected at the end
            count = min(count, (last + side) // self.hop_length + 1)
            padded = np.pad(np.pad(waveform[: last + 1], (0, side)), (side, 0), mode="reflect")
            padded = np.pad(padded, (0, max(0, (count - 1) * self.hop_length + size - len(padded))))
        else:
            padded = np.pad(np.pad(waveform, (0, length - len(waveform))), side, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, size)[:: self.hop_length]
        window, filters = _window(size), mel_filters(size, self.feature_size, self.sampling_rate).astype(np.float32)
        for first in range(0, count, _BLOCK):
            spectrum = np.fft.rfft(windows[first : min(first + _BLOCK, count)] * window, axis=-1)
            power = spectrum.real**2
            power += spectrum.imag**2
            yield first, power.astype(np.float32) @ filters


_MOST = 10**7


@functools.lru_cache(maxsize=4)
def _window(size: int) -> Float64[np.ndarray, " W"]:
    """A periodic Hann window."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)


@functools.lru_cache(maxsize=4)
def mel_filters(size: int, bins: int, rate: int) -> Float64[np.ndarray, "_ C"]:
    """What each bin takes of the power at each frequency: triangles of one area, evenly spaced on Slaney's mel scale.

    Args:
      size: samples of a window. rate: samples of a second.
    """
    ends = _hertz(np.linspace(0.0, _mel(_HIGHEST), bins + 2))
    at = np.linspace(0, rate // 2, size // 2 + 1)
    rising = (at[:, None] - ends[:-2]) / np.diff(ends)[:-1]
    falling = (ends[2:] - at[:, None]) / np.diff(ends)[1:]
    return np.maximum(0, np.minimum(rising, falling)) * (2.0 / (ends[2:] - ends[:-2]))


_LINEAR, _KNEE, _STEP = 200.0 / 3, 1000.0, math.log(6.4) / 27
"""Hertz of a mel below the knee, hertz of the knee, and the logarithm of what a mel is times above it."""


def _mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < _KNEE else _KNEE / _LINEAR + math.log(hertz / _KNEE) / _STEP


def _hertz(mels: Float64[np.ndarray, " _"]) -> Float64[np.ndarray, " _"]:
    knee = _KNEE / _LINEAR
    return np.where(mels < knee, mels * _LINEAR, _KNEE * np.exp(_STEP * (mels - knee)))
