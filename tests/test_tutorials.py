"""docs/images.md, speech.md and seq2seq.md: their commands run as they stand, in their small form, and so does their Python.

The files and model folders that a page names are there, small and random; long trainings take a few steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from multilingual import multilingual

import jaxft
from jaxft import __main__
from jaxft.data.processors.image import fresh_processor
from jaxft.data.processors.log_mel import LogMel
from jaxft.data.processors.speech import SETTINGS, SpeechProcessor
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_training import Wanted, train_tokenizer
from jaxft.hub.pretrained import export_folder
from jaxft.models.families import bart, m2m100, t5, vit, whisper
from jaxft.models.initial import init_params

DOCS = Path(__file__).parents[1] / "docs"
_SMALL = {
    "configs/runs/my_texts.yaml": "configs/runs/my_texts.yaml\ntrain.epochs=1\ntask.generation.max_new_tokens=8"
    "\ntask.generation.num_beams=1",
    "configs/runs/my_t5.yaml": "configs/runs/my_t5.yaml\ntrain.steps=2\neval.every=2\ndata.max_length=64\n"
    "model.arch={hidden_size: 16, num_hidden_layers: 1, num_decoder_layers: 1, intermediate_size: 16}",
    "train.steps=4000": "train.steps=2\ntask.max_target_length=24\ntask.generation.max_new_tokens=12",
    "train.epochs=3": "train.epochs=1",
    "train.batch_size=16": "train.batch_size=8",
}
T5 = dataclasses.replace(t5.TINY, num_hidden_layers=1, num_decoder_layers=1)
MBART = dataclasses.replace(bart.TINY, model_type="mbart")
SENTENCES = ["the cat sleeps", "the old dog runs home", "a small bird sings in the garden", "say it again"]


def commands(page: str) -> list[tuple[list[str], str | None]]:
    """Arguments of ``jaxft`` on a page, in order, and the file that each one's output goes to."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            assert line.startswith("$ jaxft "), line
            words = [part for word in shlex.split(line)[2:] for part in _SMALL.get(word, word).split("\n")]
            target = words[words.index(">") + 1] if ">" in words else None
            found.append((words[: words.index(">")] if target else words, target))
    return found


def python(page: str) -> list[str]:
    """Its blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def follow(page: str) -> dict[str, str]:
    """Runs the commands of a page; what each kind of them said."""
    said = {}
    for arguments, target in commands(page):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert __main__.main(arguments) == 0, arguments
        said[arguments[0]] = out.getvalue()
        if target:
            Path(target).write_text(out.getvalue())
    return said


def write_model(
    folder: str, family: Any, config: Any, head: str, processor: Any, files: Mapping[str, str] | None = None
) -> None:
    """A folder of random weights by the name that a page has for it."""
    model = family.Model(config, head)
    params = jax.device_get(init_params(model, 0))
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    export_folder(folder, {}, family, model, params, tokenizer=processor, files=files, note=lambda text: None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder, on a machine of one device."""
    monkeypatch.chdir(tmp_path)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: one)
    return tmp_path


def write_flowers(folder: str, each: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(each)
    for name, middle in (("daisy", 210), ("tulip", 60)):
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for number in range(1, each + 1):
            pixels = np.clip(rng.normal(middle, 25, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(Path(folder) / name / f"{number:03}.jpg")


def test_the_page_on_images(here: Path) -> None:
    for folder, each in (("flowers", 24), ("flowers_held_out", 4)):
        write_flowers(folder, each)
    for name in ("photo.jpg", "more_photos/one.jpg", "more_photos/two.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy("flowers/daisy/001.jpg", name)
    config = vit.TINY
    processor = fresh_processor(here, 16, 16, config.num_channels)
    write_model("google/vit-base-patch16-224-in21k", vit, config, "image_classification", processor)
    said = follow("images.md")
    assert len([json.loads(line) for line in said["predict"].splitlines()]) == 3
    assert len(Path("said.jsonl").read_text().splitlines()) == 8
    (block,) = python("images.md")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block, {})
    assert re.fullmatch(r"\[[01]\]\n", out.getvalue())


SPEECH: dict[str, Any] = {
    "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "lang_to_id": {"<|en|>": 60, "<|de|>": 61},
    "task_to_id": {"translate": 62, "transcribe": 63}, "no_timestamps_token_id": 65, "prev_sot_token_id": 64, "is_multilingual": True,
    "suppress_tokens": [], "begin_suppress_tokens": [1], "max_initial_timestamp_index": 8,
}  # fmt: skip
"""Texts of 60 tokens; times from 66 on, 51 of them in the second that the model hears."""


def write_wav(path: str, seconds: float, seed: int) -> None:
    with wave.open(path, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(np.int16(np.random.default_rng(seed).normal(size=int(seconds * 16000)) * 3000).tobytes())


def test_the_page_on_speech(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 6), ("test", 2)):
        rows = []
        for number in range(count):
            write_wav(f"{split}{number}.wav", 0.6, number)
            rows.append({"audio": f"{split}{number}.wav", "text": SENTENCES[number % 4]})
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_wav("meeting.wav", 2.5, 9)
    train_tokenizer(lambda: SENTENCES * 5, Wanted("wordpiece", 60, "encoder-decoder", max_length=24), here / "tok")
    tokenizer = Tokenizer(here / "tok", None)
    config = dataclasses.replace(
        whisper.TINY, vocab_size=117, num_hidden_layers=1, num_decoder_layers=1, max_source_positions=50
    )
    log_mel = LogMel(config.num_mel_bins, chunk_length=1)
    files = {SETTINGS: json.dumps(SPEECH)}
    write_model(
        "openai/whisper-small", whisper, config, "speech_to_text", SpeechProcessor(tokenizer, log_mel, SPEECH), files
    )
    follow("speech.md")
    (meeting,) = [json.loads(line) for line in Path("meeting.jsonl").read_text().splitlines()]
    assert meeting["audio"] == "meeting.wav"
    assert meeting["language"] in ("de", "en")
    call, transcripts = python("speech.md")
    loaded = jaxft.load("runs/speech/export")
    names: dict[str, Any] = {
        "params": loaded.params,
        "frames": np.zeros((1, config.frames, config.num_mel_bins), np.float32),
        "decoder_tokens": np.zeros((1, 3), np.int32),
    }
    monkeypatch.setattr(whisper, "Config", lambda: config)
    exec(call, names)
    assert names["out"].logits.shape == (1, 3, 117)
    names |= {"folder": Path("runs/speech/export"), "model": loaded.model, "log_mel": log_mel}
    names["samples"] = np.random.default_rng(0).normal(size=40000).astype(np.float32) * 0.1
    exec(transcripts, names)
    assert names["transcript"].segments


def write_translators(here: Path) -> None:
    """The models of several languages that the page names."""
    for name, kind, family, config in (
        ("facebook/nllb-200-distilled-600M", "NllbTokenizer", m2m100, m2m100.TINY),
        ("facebook/mbart-large-50-many-to-many-mmt", "MBart50Tokenizer", bart, MBART),
    ):
        folder, *_ = multilingual(kind, here / kind)
        tokenizer, layers = Tokenizer(folder, None), {"num_hidden_layers": 1, "num_decoder_layers": 1}
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size, max_position_embeddings=512, **layers)
        write_model(name, family, config, "seq2seq_lm", tokenizer)


def test_the_page_on_texts(here: Path) -> None:
    (here / "configs").symlink_to(DOCS.parent / "configs")
    for split, count in (("train", 16), ("test", 4)):
        rows = [{"text": SENTENCES[number % 4], "target": SENTENCES[number % 3]} for number in range(count)]
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {number}"}) + "\n" for number in range(300) for text in SENTENCES)
    )
    train_tokenizer(lambda: SENTENCES * 5, Wanted("wordpiece", 80, "encoder-decoder", max_length=64), here / "tok")
    write_model("google-t5/t5-small", t5, T5, "seq2seq_lm", Tokenizer(here / "tok", None))
    write_translators(here)
    said = follow("seq2seq.md")
    assert json.loads(Path("runs/german/export/tokenizer_config.json").read_text())["tgt_lang"] == "deu_Latn"
    assert "rouge" in json.loads(Path("runs/my_texts/metrics.json").read_text())["scored_by"]
    assert said["generate"]
    assert "mesh: one device" in said["train"]
    assert Path("runs/my_t5/export/model.safetensors").is_file()
