"""Sound from files: what is read, and every kind of file that cannot be."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxft.data.processors.sound import at_rate, read_sound, resampled
from jaxft.errors import UserError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

TONE = np.sin(np.arange(8000) * 0.2).astype(np.float32) * 0.5


def wav(samples: np.ndarray = TONE, rate: int = 8000, **more: str) -> bytes:
    made = io.BytesIO()
    soundfile.write(made, samples, rate, **{"format": "WAV", "subtype": "PCM_16", **more})
    return made.getvalue()


@pytest.mark.parametrize(
    ("form", "subtype", "apart"),
    [
        ("WAV", "PCM_16", 4e-5),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 4e-5),
        ("OGG", "VORBIS", 0.05),
        ("MP3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_files_of_each_form_are_read(form: str, subtype: str, apart: float, tmp_path: Path) -> None:
    path = tmp_path / f"tone.{form.lower()}"
    path.write_bytes(wav(format=form, subtype=subtype))
    for source in (path, path.read_bytes()):
        sound = read_sound(source, "tone")
        assert (sound.rate, sound.channels, sound.samples.dtype) == (8000, 1, np.float32)
        assert sound.seconds == pytest.approx(1, abs=0.2)
        np.testing.assert_allclose(sound.samples[2000:6000], TONE[2000:6000], atol=apart)


def test_channels_become_their_mean_and_rates_the_one_asked_for() -> None:
    sound = read_sound(wav(np.stack([TONE, 0 * TONE], 1), subtype="FLOAT"), "stereo")
    assert sound.channels == 2
    np.testing.assert_allclose(sound.samples, TONE / 2, atol=1e-7)
    samples, changed = at_rate(sound, 16000)
    assert changed == "mean of 2 channels, resampled from 8000 to 16000"
    np.testing.assert_allclose(samples[4000:12000:2], TONE[2000:6000] / 2, atol=2e-3)
    assert at_rate(sound._replace(channels=1), 8000)[1] is None
    assert resampled(sound.samples, 8000, 8000) is sound.samples


def broken(which: str) -> bytes:
    whole = wav()
    if which == "rate":
        return whole[:24] + struct.pack("<I", 4) + whole[28:]
    if which == "nan":
        return wav(np.where(np.arange(8000) == 99, np.nan, TONE), subtype="FLOAT")
    return {
        "empty": b"",
        "text": b"no sound at all, but a text\n" * 40,
        "header": whole[:30],
        "none": wav(TONE[:0]),
        "flac": wav(format="FLAC")[:3000],
    }[which]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("empty", "is empty"),
        ("text", "cannot be read as sound"),
        ("header", "cannot be read as sound"),
        ("none", "has no samples"),
        ("flac", "breaks off after|cannot be read as sound"),
        ("rate", "4 samples a second"),
        ("nan", "sample 100 is not a number"),
    ],
)
def test_what_is_no_sound_is_refused_in_one_line(which: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(broken(which))
    for source in (path, path.read_bytes()):
        with pytest.raises(UserError, match=message) as raised:
            read_sound(source, "clips/a.wav")
        text = str(raised.value)
        assert text.startswith("clips/a.wav: ")
        assert "\n" not in text
        assert len(text) <= 300


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_sound(tmp_path / "none.wav", "none.wav")
    with pytest.raises(UserError, match="is not a file"):
        read_sound(tmp_path, "folder")
