"""What the tests of transcripts share: tiny random models of speech, ours and the reference's, and what their folders would say."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import make_reference, ours_of

from jaxft import models
from jaxft.config.speech import SpeechTokens
from jaxft.models.families import whisper

CONFIG = dataclasses.replace(
    whisper.TINY, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, num_hidden_layers=1, num_decoder_layers=1,
    vocab_size=120, num_mel_bins=8, max_source_positions=50, pad_token_id=50, decoder_start_token_id=51, max_position_embeddings=40,
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "decoder_start_token_id": 51, "eos_token_id": 50, "pad_token_id": 50, "bos_token_id": 50,
    "lang_to_id": {"<|en|>": 52, "<|de|>": 53, "<|fr|>": 54}, "task_to_id": {"translate": 56, "transcribe": 57},
    "prev_sot_token_id": 59, "no_timestamps_token_id": 61, "max_initial_timestamp_index": 8, "is_multilingual": True,
    "suppress_tokens": [3, 4, 51, 52, 53, 54, 56, 57, 58, 59, 60], "begin_suppress_tokens": [7, 50],
}  # fmt: skip
"""What its generation_config.json says: 46 tokens of text, the end 50, times from 62 (0.00 s) to 119 (1.14 s), of stretches of a second."""
TOKENS = SpeechTokens.from_json(SETTINGS, 51, "generation_config.json")


@functools.cache
def pair(seed: int = 0, config: Any = CONFIG) -> tuple[Any, Any, Any]:
    """(the reference's model, our model, its parameters), random but with times and ends that come up now and then."""
    torch = pytest.importorskip("torch")
    theirs = make_reference(models.family("whisper"), config, whisper.SPEECH_TO_TEXT, "whisper", seed)
    with torch.no_grad():  # sound that makes a difference, and transcripts that come to an end
        for parameter in theirs.model.decoder.parameters():
            parameter.mul_(1.5)
        theirs.model.decoder.embed_tokens.weight[50] *= 1.5
    with tempfile.TemporaryDirectory() as folder:
        model, params = ours_of(models.family("whisper"), theirs, config, whisper.SPEECH_TO_TEXT, Path(folder))
    for name, value in SETTINGS.items():
        setattr(theirs.generation_config, name, value)
    return theirs, model, params


def frames_of(rows: int, seed: int = 0, count: int = CONFIG.frames) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, count, CONFIG.num_mel_bins)).astype(np.float32)


def as_theirs(frames: np.ndarray) -> Any:
    return pytest.importorskip("torch").tensor(frames.transpose(0, 2, 1).copy())
