"""Log-mel frames beside the reference's extractor."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from jaxft.data.processors.log_mel import LogMel, mel_filters
from jaxft.errors import UserError

transformers = pytest.importorskip("transformers")
RATE = 16000


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Tones that come and go over faint noise: loud and silent places, as in speech."""
    rng = np.random.default_rng(seed)
    at = np.arange(int(seconds * RATE)) / RATE
    tones = sum(np.sin(2 * np.pi * hertz * at) / (1 + i) for i, hertz in enumerate(rng.uniform(80, 4000, 6)))
    return (0.2 * tones * (np.sin(3 * at) > 0) + 1e-3 * rng.normal(size=at.size)).astype(np.float32)


SOUNDS = {
    "speech": lambda: speech(7.3),
    "noise": lambda: np.random.default_rng(1).normal(size=5 * RATE).astype(np.float32),
    "shorter than a window": lambda: speech(0.01),
    "one sample": lambda: np.ones(1, np.float32),
    "no sample": lambda: np.zeros(0, np.float32),
    "zeros": lambda: np.zeros(3 * RATE, np.float32),
    "silence behind": lambda: np.concatenate([speech(2), np.zeros(RATE, np.float32)]),
    "whole": lambda: speech(30),
    "nearly whole": lambda: speech(30)[:-150],
    "longer": lambda: speech(31),
    "a pure tone": lambda: np.sin(np.arange(30 * RATE) * 0.3).astype(np.float32),
}


def exact(extractor: Any, waveform: np.ndarray) -> np.ndarray:
    """The reference's own values in float64."""
    return extractor._np_extract_fbank_features(waveform[None], "cpu")[0].T


@pytest.mark.sampled(6)
@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("which", SOUNDS)
def test_frames_equal_the_reference(which: str, bins: int) -> None:
    extractor, ours, sound = (
        transformers.WhisperFeatureExtractor(feature_size=bins),
        LogMel(feature_size=bins),
        SOUNDS[which](),
    )
    frames = ours(sound)
    assert frames.shape == (3000, bins)
    assert frames.dtype == np.float32
    stretch = np.pad(sound[: 30 * RATE], (0, max(0, 30 * RATE - len(sound))))
    np.testing.assert_allclose(frames, exact(extractor, stretch), rtol=0, atol=1e-5)
    if len(sound) > 400:
        np.testing.assert_allclose(ours.whole(sound), exact(extractor, sound), rtol=0, atol=1e-5)
    if len(sound):  # its float32 path, as far from its float64 one as from ours
        asked = extractor(sound, sampling_rate=RATE, return_tensors="np").input_features[0].T
        np.testing.assert_allclose(frames, asked, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("hop", "window", "seconds"), [(160, 512, 8), (100, 250, 1), (320, 322, 2)])
def test_other_settings_equal_the_reference(hop: int, window: int, seconds: int) -> None:
    settings = {"hop_length": hop, "n_fft": window, "chunk_length": seconds, "feature_size": 40}
    extractor, ours, sound = transformers.WhisperFeatureExtractor(**settings), LogMel(**settings), speech(seconds)
    wanted = exact(extractor, sound)
    assert ours(sound).shape == (ours.frames, 40)
    np.testing.assert_allclose(ours(sound), wanted[: ours.frames], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bins", [80, 128])
def test_filters_equal_the_reference(bins: int) -> None:
    wanted = transformers.WhisperFeatureExtractor(feature_size=bins).mel_filters
    np.testing.assert_allclose(mel_filters(400, bins, RATE), wanted, rtol=0, atol=1e-14)


def test_settings_come_back() -> None:
    theirs = json.loads(transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=20).to_json_string())
    ours = LogMel.from_json(theirs, "preprocessor_config.json")
    assert (ours.feature_size, ours.frames) == (128, 2000)
    assert LogMel.from_json(ours.to_json(), "again") == ours
    again = transformers.WhisperFeatureExtractor(**ours.to_json())
    assert (again.feature_size, again.nb_max_frames) == (128, 2000)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"feature_extractor_type": "ViTImageProcessor"},
            "feature_extractor_type='ViTImageProcessor' is not supported",
        ),
        ({"dither": 0.1}, "dither=0.1 is not supported; set it to 0.0"),
        ({"feature_size": "80"}, "feature_size='80': must be a whole number"),
        ({"hop_length": 0}, "hop_length=0: must be a whole number"),
        ({"n_fft": 401}, "n_fft=401: must be even"),
        ({"hop_length": 480001}, "a stretch of 480000 samples has no frame"),
        ({"padding_value": float("nan")}, "padding_value=nan"),
    ],
)
def test_settings_that_make_no_frames_are_refused(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        LogMel.from_json(stated, "m/preprocessor_config.json")
    assert str(raised.value).startswith("m/preprocessor_config.json: ")
