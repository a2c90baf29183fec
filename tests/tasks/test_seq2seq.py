"""Texts from texts: what is learnt of targets, what evaluation scores, and a model that is trained, exported and asked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import refusal, run

from jaxft.config import load_config
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_training import Wanted, train_tokenizer
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.tasks._written import text_scores
from jaxft.tasks.seq2seq import Task, encode

WORDS = {
    "red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "cat": "Katze", "dog": "Hund", "bird": "Vogel",
    "fish": "Fisch", "tree": "Baum", "house": "Haus", "road": "Weg", "old": "alt", "new": "neu", "fast": "schnell",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, training rows and held-out ones."""
    made = tmp_path_factory.mktemp("seq2seq")
    words = [*WORDS, *WORDS.values()]
    train_tokenizer(lambda: words * 5, Wanted("wordpiece", 160, "encoder-decoder", max_length=32), made / "tok")
    rng = np.random.default_rng(0)
    for name, count in (("train", 256), ("eval", 16)):
        with (made / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                chosen = rng.choice([*WORDS], rng.integers(1, 3)).tolist()
                row = {"text": " ".join(chosen), "target": " ".join(WORDS[word] for word in chosen)}
                file.write(json.dumps(row) + "\n")
    return made


def encoded(folder: Path, source: str, target: str, *more: str, length: int | None = 20) -> dict[str, np.ndarray]:
    config = load_config(None, ["task.name=seq2seq", "task.max_target_length=6", *more])
    (one,) = encode([Row((source, target), "row 1")], Tokenizer(folder / "tok", length), None, config)
    return dict(one.example)


def test_sources_and_targets_end_as_texts_of_the_tokenizer_do(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "tok", None)
    red, rot, end = (tokenizer.ids([text])[0] for text in ("red", "rot", ""))
    assert end == [tokenizer.special.end] == [1]
    plain = encoded(folder, "red", "rot")
    assert (plain["tokens"].tolist(), plain["target"].tolist()) == (red, rot)
    ahead = encoded(folder, "red", "rot", "task.prefix=dog ")
    assert ahead["tokens"].tolist() == tokenizer.ids(["dog red"])[0]
    cut = encoded(folder, "red", "rot " * 9)["target"].tolist()
    assert cut == [*(rot[:-1] * 9)[:5], 1]
    with pytest.raises(UserError, match="max_target_length=6 is above"):
        encoded(folder, "red", "rot", length=4)


def test_targets_of_another_language_are_refused(folder: Path, tmp_path: Path) -> None:
    """Their code would be that of the sources."""
    shutil.copytree(folder / "tok", tmp_path / "tok")
    path = tmp_path / "tok" / "tokenizer_config.json"
    said = json.loads(path.read_text())
    for target in ("de_DE", None):
        path.write_text(json.dumps(said | {"src_lang": "en_XX", "tgt_lang": target}))
        with pytest.raises(UserError, match=r"src_lang='en_XX', tgt_lang=.*: targets would be given"):
            encoded(tmp_path, "red", "rot")
    path.write_text(json.dumps(said | {"src_lang": "en_XX", "tgt_lang": "en_XX"}))
    assert encoded(tmp_path, "red", "rot")["target"].size


def test_the_decoder_sees_targets_one_place_later() -> None:
    batch = {
        "target": np.array([[5, 6, 1], [7, 1, 0]]),
        "target_mask": np.array([[1, 1, 1], [1, 1, 0]]),
        "weights": np.ones(2),
    }
    made = Task(start=9).prepare({name: jax.numpy.asarray(x) for name, x in batch.items()}, jax.random.key(0))
    assert made["decoder_tokens"].tolist() == [[9, 5, 6], [9, 7, 1]]
    assert made["targets"].tolist() == batch["target"].tolist()
    assert made["target_weights"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_label_smoothing_and_a_loss_in_tiles_are_one_line() -> None:
    from jaxft.layers import TokenScore
    from jaxft.models.contract import Output

    ones = jax.numpy.ones((1, 2))
    batch = {"targets": jax.numpy.ones((1, 2), jax.numpy.int32), "target_weights": ones, "weights": ones[:, 0]}
    in_tiles = Output(ones[..., None], score=TokenScore(ones, batch["targets"], ones))
    assert float(Task().sums(lambda batch, key: in_tiles, batch, None)["loss"]) == 2
    with pytest.raises(UserError, match=r"task\.label_smoothing=0\.1 needs the logits of the whole vocabulary"):
        Task(smoothing=0.1).sums(lambda batch, key: in_tiles, batch, None)


def test_texts_are_scored_as_the_fields_packages_score_them() -> None:
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU, CHRF

    written = ["the cat sat on the mat", "a dog ran away quickly", "nothing alike"]
    wanted = ["the cat sat on a mat", "the dog runs away quickly", "something else"]
    found: Any = text_scores(("rouge", "bleu", "chrf"), written, wanted)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    each = [scorer.score(right, text) for right, text in zip(wanted, written, strict=True)]
    for name in ("rouge1", "rougeL"):
        assert found[name] == pytest.approx(100 * np.mean([one[name].fmeasure for one in each]))
    assert found["bleu"] == BLEU().corpus_score(written, [wanted]).score
    assert found["chrf"] == CHRF().corpus_score(written, [wanted]).score
    assert found["scored_by"]["bleu"].startswith("nrefs:1|")
    same: Any = text_scores(("rouge", "bleu", "chrf"), wanted, wanted)
    assert [round(same[name]) for name in ("rougeL", "rougeLsum", "bleu", "chrf")] == [100] * 4


def test_what_is_said_beside_the_weights_is_how_texts_are_written() -> None:
    from jaxft.config.generation import GenerationConfig

    task = Task(
        start=3, generation=GenerationConfig(num_beams=4, max_new_tokens=20, eos_token_id=(1,), length_penalty=2.0)
    )
    said = json.loads(task.files(8, None)["generation_config.json"])
    assert said == {
        "num_beams": 4,
        "max_new_tokens": 20,
        "eos_token_id": 1,
        "length_penalty": 2.0,
        "decoder_start_token_id": 3,
    }
    many = dataclasses.replace(task, generation=GenerationConfig(eos_token_id=(1, 2)))
    assert json.loads(many.files(8, None)["generation_config.json"])["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.max_target_length=0", "task.max_target_length=0: must be at least 1"),
        ("task.label_smoothing=1", "task.label_smoothing=1.0: must be 0 or more, and below 1"),
        ("task.scores=[]", "task.scores=[]: name one at least"),
        ("task.generation.do_sample=true", "task.generation.do_sample=true: evaluation draws nothing"),
        ("task.generation.num_beams=0", "num_beams=0: must be a whole number from 1"),
        ("task.scores=[meteor]", "task.scores"),
    ],
)
def test_options_that_contradict_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(None, ["task.name=seq2seq", override])
    assert message in str(raised.value)


def settings(folder: Path, out: Path) -> list[str]:
    arch = "hidden_size: 48, num_hidden_layers: 1, num_decoder_layers: 1, num_attention_heads: 2, head_size: 24"
    return [
        "model.family=t5", f"model.arch={{vocab_size: 160, {arch}, intermediate_size: 96, dropout_rate: 0.0}}",
        "task.name=seq2seq", "task.max_target_length=12", "task.generation.max_new_tokens=12", "task.generation.num_beams=2",
        f"data.tokenizer={folder / 'tok'}", f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'eval.jsonl'}",
        "data.max_length=16", "data.buckets=[16]", "train.batch_size=32", "train.steps=240", "eval.batch_size=16", "eval.every=240",
        "optim.learning_rate=5e-3", "optim.warmup_steps=10", "train.compilation_cache=null",
        f"train.out={out}", "mesh.data=4", "mesh.tensor=2", "log.samples=3",
    ]  # fmt: skip


def test_train_evaluate_export_and_write(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", *settings(folder, tmp_path / "run"))
    assert code == 0, err
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert scores["chrf"] > 60
    assert scores["accuracy"] > 0.8
    assert set(scores["scored_by"]) == {"rouge", "bleu", "chrf"}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(one["prompt"], one["wanted"]) for one in samples] == [
        (row["text"], row["target"]) for row in map(json.loads, (folder / "eval.jsonl").read_text().splitlines()[:3])
    ]
    export = tmp_path / "run" / "export"
    assert json.loads((export / "generation_config.json").read_text())["num_beams"] == 2
    code, out, err = run(capsys, "generate", export, folder / "eval.jsonl")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    wanted = [json.loads(line)["target"] for line in (folder / "eval.jsonl").read_text().splitlines()]
    # What evaluation scored is what users of the folder get.
    texts: Any = text_scores(("chrf",), [row["text"] for row in rows], wanted)
    assert texts["chrf"] == pytest.approx(scores["chrf"])
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    for row in rows[:4]:
        with torch.no_grad():
            made = model.generate(tokenizer(row["prompt"], return_tensors="pt").input_ids)
        assert tokenizer.decode(made[0], skip_special_tokens=True) == row["text"]
    assert "jaxft generate writes its texts" in refusal(capsys, "predict", export, folder / "eval.jsonl")


def test_pairs_share_rows_in_training_and_are_written_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = (
        "mesh.",
        "data.buckets",
        "train.steps",
        "eval.every",
        "train.batch_size",
        "log.samples",
        "task.generation.num",
    )
    given = [one for one in settings(folder, tmp_path / "run") if not one.startswith(left)]
    given += ["train.steps=3", "eval.every=3", "train.batch_size=76", "train.accumulation=2", "data.packing=auto"]
    given += ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.export=false", "optim.warmup_steps=0"]
    code, out, err = run(capsys, "train", *given)
    assert code == 0, err
    assert "data.packing=auto: best_fit; " in out
    assert "held-out rows are not packed: evaluation lets the model write, a text for each row" in out
    assert "train: packed 256 pairs into " in out
    assert "eval 16 texts in 16 rows" in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"] == 16
