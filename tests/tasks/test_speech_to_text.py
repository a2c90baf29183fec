"""Texts from speech: what is learnt of transcripts, how they are scored, and a model that is trained, exported and asked."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import refusal, run

from jaxft.config import RunConfig
from jaxft.config.tasks.speech_to_text import Config
from jaxft.data.processors.speech import SpeechProcessor, open_processor
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_training import Wanted, train_tokenizer
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.tasks import Targets
from jaxft.tasks._written import text_scores
from jaxft.tasks.speech_to_text import encode, make_task, prefix_of

TONES = {"one": 300, "two": 700, "three": 1500}
ARCH = (
    "model.arch={vocab_size: 64, hidden_size: 32, num_hidden_layers: 1, num_decoder_layers: 1, num_attention_heads: 2, "
    "num_decoder_heads: 2, intermediate_size: 64, decoder_intermediate_size: 64, max_source_positions: 50, "
    "max_position_embeddings: 16, num_mel_bins: 16, pad_token_id: 0, decoder_start_token_id: 0}"
)
SETTINGS = {
    "decoder_start_token_id": 0, "eos_token_id": 1, "lang_to_id": {"<|en|>": 50, "<|de|>": 51},
    "task_to_id": {"translate": 52, "transcribe": 53}, "no_timestamps_token_id": 54, "is_multilingual": True,
    "suppress_tokens": [7], "begin_suppress_tokens": [1],
}  # fmt: skip


def clip(word: str, seconds: float = 0.5, rate: int = 8000, channels: int = 1, seed: int = 0) -> bytes:
    """A tone with some noise, as a WAV file."""
    times = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(times)) * 0.02
    samples = np.int16((0.4 * np.sin(2 * np.pi * TONES[word] * times) + noise) * 32000)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.repeat(samples, channels).tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and rows of tones and their names."""
    made = tmp_path_factory.mktemp("speech")
    train_tokenizer(lambda: [*TONES] * 5, Wanted("wordpiece", 48, "encoder-decoder", max_length=16), made / "tok")
    for split, each in (("train", 8), ("eval", 2)):
        (made / split).mkdir()
        with (made / f"{split}.jsonl").open("w") as rows:
            for word in TONES:
                for number in range(each):
                    name = f"{split}/{word}{number}.wav"
                    (made / name).write_bytes(clip(word, 0.3 + 0.05 * number, seed=number, channels=1 + number % 2))
                    rows.write(json.dumps({"audio": name, "text": word}) + "\n")
    return made


def processor_of(folder: Path, settings: dict[str, Any] | None = None) -> SpeechProcessor:
    made = open_processor(folder / "tok", None, 100, 16, "whisper")
    return SpeechProcessor(made.tokenizer, made.log_mel, settings or {})


def test_transcripts_begin_with_language_and_task_and_end_once(folder: Path) -> None:
    plain, known = processor_of(folder), processor_of(folder, SETTINGS)
    tokens = Tokenizer(folder / "tok", None)
    one, row = tokens.plain(["one"])[0][0], [Row((clip("one"), "one"), "row 1")]

    def target(processor: SpeechProcessor, **options: Any) -> list[int]:
        config = RunConfig(task=Config(name="speech_to_text", **options))
        (made,) = encode(row, processor, None, config)
        return made.example["target"].tolist()

    assert target(plain) == [*one, 1]
    assert target(known, language="german") == [51, 53, 54, *one, 1]
    assert target(known, language="en", translate=True) == [50, 52, 54, *one, 1]
    assert target(known, language="en", timestamps=True) == [50, 53, *one, 1]
    assert target(known, language="en", max_target_length=4) == [50, 53, 54, 1]
    with pytest.raises(UserError, match="no generation_config"):
        prefix_of(Config(language="en"), plain)
    with pytest.raises(UserError, match=r"knows 2 languages: set task\.language"):
        prefix_of(Config(), known)
    with pytest.raises(UserError, match="language 'klingon' is not one"):
        prefix_of(Config(language="klingon"), known)


def test_a_task_follows_what_the_folder_says(folder: Path) -> None:
    from jaxft.models.families import whisper

    facts, options = whisper.facts(whisper.TINY), Config(language="en", max_target_length=20)
    known = processor_of(folder, SETTINGS)
    with pytest.raises(UserError, match="transcripts have at most 64 tokens, 4 of them"):
        make_task(options, Targets(), facts, known)


def test_errors_are_counted_over_all_transcripts() -> None:
    jiwer = pytest.importorskip("jiwer")
    wanted, written = ["Press one, please.", "(beep) Two", "three"], ["press one please", "two", "tree three"]
    found = text_scores(("wer",), written, wanted)
    assert found["wer"] == pytest.approx(100 * jiwer.wer(wanted, written))
    assert found["cer"] == pytest.approx(100 * jiwer.cer(wanted, written))
    assert found["wer_normalized"] == pytest.approx(100 * 1 / 5)
    assert found["cer_normalized"] == pytest.approx(100 * 5 / 24)
    assert text_scores(("wer",), ["", "a"], ["a b", ""])["wer"] == 100.0  # a transcript of nothing has no words to miss


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run on these rows."""
    from jaxft import __main__

    assert __main__.main(["train", *overrides(folder, folder / "run", "train.steps=120", "eval.every=60")]) == 0
    return folder


def overrides(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("task.name=speech_to_text", "model.family=whisper", ARCH, f"data.tokenizer={folder / 'tok'}"),
        *(f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'eval.jsonl'}", f"train.out={out}"),
        *("train.batch_size=8", "train.steps=4", "eval.batch_size=8", "optim.learning_rate=3e-3"),
        *("task.max_target_length=8", "task.generation.max_new_tokens=6", "log.samples=2"),
        *more,
    ]


def test_a_model_learns_tones_and_transcribes_them(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = json.loads((trained / "run/metrics.json").read_text())
    assert scores["wer"] <= 20
    assert "jiwer" in scores["scored_by"]["wer"]
    export = trained / "run/export"
    code, out, err = run(capsys, "transcribe", export, trained / "eval")
    assert "3 recordings: mean of 2 channels, resampled from 8000 to 16000" in err
    said = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert len(said) == 6
    right = [one["text"] == Path(one["audio"]).stem[:-1] for one in said]
    assert sum(right) >= 5
    stored = json.loads((export / "generation_config.json").read_text())
    assert (stored["eos_token_id"], stored["decoder_start_token_id"], stored["max_new_tokens"]) == (1, 0, 6)
    samples = [json.loads(line) for line in (trained / "run/samples.jsonl").read_text().splitlines()]
    assert samples[-1]["wanted"] in TONES


def test_a_checkpoint_transcribes_as_its_export_does(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    step = max((trained / "run/checkpoints").iterdir(), key=lambda one: one.name.isdigit() and int(one.name))
    file = trained / "eval/three0.wav"
    code, out, _ = run(capsys, "transcribe", step, file)
    assert (code, json.loads(out)["text"]) == (0, "three")
    assert run(capsys, "convert", trained / "run/export", tmp_path / "kept", "--to", "jaxft")[0] == 0
    assert {"preprocessor_config.json", "generation_config.json"} <= {
        one.name for one in (tmp_path / "kept/tokenizer").iterdir()
    }


@pytest.mark.slow
def test_a_run_transcribes_with_beams_what_a_table_names(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "transcribe", trained / "run", trained / "eval.jsonl", "--num-beams", 3)
    assert sum(json.loads(line)["text"] in TONES for line in out.splitlines()) >= 5


def test_the_export_writes_the_same_in_the_reference(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers, torch = (pytest.importorskip(name) for name in ("transformers", "torch"))
    export = trained / "run/export"
    model = transformers.WhisperForConditionalGeneration.from_pretrained(export)
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(export)
    file = trained / "eval/two0.wav"
    samples, changed = processor_of(trained).samples(str(file), "two")
    assert changed == "resampled from 8000 to 16000"
    features = extractor(samples, sampling_rate=16000, return_tensors="np").input_features
    with torch.no_grad():
        made = transformers.generation.GenerationMixin.generate(
            model, input_features=torch.tensor(features), do_sample=False, max_new_tokens=6
        )
    text = Tokenizer(export, None).decode(made[0].numpy())
    _, out, _ = run(capsys, "transcribe", export, file)
    assert json.loads(out)["text"] == text


def test_what_cannot_work_is_said_in_a_line(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    how, export = overrides(trained, tmp_path / "run"), trained / "run/export"
    (tmp_path / "long.wav").write_bytes(clip("one", 1.5))
    (tmp_path / "rows.jsonl").write_text('{"audio": "long.wav", "text": "one"}\n')
    rows = f"data.train={tmp_path / 'rows.jsonl'}"
    assert "1.5 s of sound, and the model hears 1 at once" in refusal(capsys, "train", *how, rows)
    code, out, _ = run(capsys, "train", *how, rows, "task.too_long=cut")
    assert code == 0
    assert "train: 1 sounds are longer" in out
    (tmp_path / "long.wav").write_bytes(b"RIFF")
    assert "long.wav" in refusal(capsys, "train", *how, rows, f"train.out={tmp_path / 'other'}")
    assert "transcripts have at most 16 tokens" in refusal(capsys, "train", *how, "task.max_target_length=40")
    assert "reads texts, and whisper is a model of sounds" in refusal(capsys, "train", *how, "task.name=seq2seq")
    assert "jaxft transcribe writes" in refusal(capsys, "predict", export, trained / "eval")
    assert "one table that names them" in refusal(capsys, "transcribe", export, trained / "eval.jsonl", "more.jsonl")
