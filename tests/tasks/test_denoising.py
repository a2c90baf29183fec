"""Texts with stretches masked: how much, where, and a BART that is trained to write them whole."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import refusal, run

from jaxft.config import load_config
from jaxft.data.processors.contract import SpecialIds
from jaxft.data.processors.tokenizer_training import Wanted, train_tokenizer
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks.contract import Targets
from jaxft.tasks.denoising import Task, infilled, make_task

PAD, BEGIN, END, MASK = 0, 1, 2, 4
TASK = Task(0.3, 3.0, MASK, (PAD, BEGIN, END, MASK), END)
PREPARED = jax.jit(TASK.prepare)


def batch_of(*texts: list[int], length: int) -> dict[str, Any]:
    tokens = np.zeros((len(texts), length), np.int32)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask), "weights": jnp.ones(len(texts))}


def source_of(made: dict[str, Any], row: int) -> list[int]:
    return np.asarray(made["tokens"][row])[np.asarray(made["mask"][row]) > 0].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_what_is_masked_is_written_whole(seed: int) -> None:
    texts = [[BEGIN, *range(10, 10 + n), END] for n in (38, 20, 7, 2, 1)]
    made = PREPARED(batch_of(*texts, length=40), jax.random.key(seed))
    for row, text in enumerate(texts):
        source, count = source_of(made, row), len(text) - 2
        stay = [token for token in source if token != MASK]
        assert len(stay) == len(text) - round(0.3 * count)
        assert stay == [token for token in text if token in stay]  # in their order
        assert (source[0], source[-1], len(source) <= len(text)) == (BEGIN, END, True)
        # Between two tokens that stay there is a mask if something was taken out there, whatever its length.
        for one, other in itertools.pairwise(stay):
            gap = text[text.index(one) + 1 : text.index(other)]
            masks = source[source.index(one) + 1 : source.index(other)]
            assert not gap or masks
        written = np.asarray(made["target_weights"][row]) > 0
        assert np.asarray(made["targets"][row])[written].tolist() == text
        assert np.asarray(made["decoder_tokens"][row])[written].tolist() == [END, *text[:-1]]


def test_a_text_is_masked_alike_whatever_stands_beside_it() -> None:
    texts = [[*range(10, 30), END], [*range(40, 75), END]]
    key = jax.random.key(3)
    alone = source_of(PREPARED(batch_of(texts[0], length=40), key), 0)
    assert alone == source_of(PREPARED(batch_of(texts[1], texts[0], length=40), key), 1)
    assert source_of(PREPARED(batch_of(texts[0], length=40), jax.random.key(4)), 0) != alone


def test_lengths_are_poissons_and_stretches_stand_anywhere() -> None:
    tokens = jnp.arange(10, 210)
    every = jnp.ones(200, bool)
    keys = jax.random.split(jax.random.key(0), 400)
    found, _ = jax.jit(jax.vmap(lambda key: infilled(tokens, every, every, 0.3, 3.0, MASK, key)))(keys)
    rows = np.asarray(found)
    masks = (rows == MASK).sum(1)
    assert abs(masks.mean() - (60 / 3 + 0.5)) < 0.5  # 60 tokens in stretches of 3, the last one cut
    there = (rows[..., None] == np.asarray(tokens)).any(1).mean(0)
    assert abs(there[10:190] - 0.7).max() < 0.1
    # Without stretches of no token, none would be put between two neighbours that both stay: e^-3 of all are such.
    kinds: Counter[bool] = Counter()
    for row in rows:
        for place in np.flatnonzero(row == MASK)[:-1]:
            if 0 < place < len(row) - 1 and MASK not in (row[place - 1], row[place + 1]) and row[place + 1]:
                kinds[bool(row[place + 1] == row[place - 1] + 1)] += 1
    assert 0.02 < kinds[True] / kinds.total() < 0.09


def test_rows_of_padding_teach_nothing() -> None:
    made = PREPARED(batch_of([], length=8), jax.random.key(0)) | {"weights": jnp.zeros(1)}
    assert (source_of(made, 0), float(TASK.weight(made))) == ([], 0)


def test_what_cannot_be_denoised_is_one_line() -> None:
    for override in ("task.noise_density=1.0", "task.mean_span=0"):
        with pytest.raises(UserError, match=override.split("=", maxsplit=1)[0]):
            load_config(None, ["task.name=denoising", override])
    options: Any = load_config(None, ["task.name=denoising"]).task
    lacking: Any = SimpleNamespace(folder="tok", special=SpecialIds(pad=0, end=2), special_ids=(0, 2))
    with pytest.raises(UserError, match="tok: the tokenizer has no mask token"):
        make_task(options, Targets(), Facts({}, ()), lacking)


@pytest.mark.slow
def test_pre_train_from_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, rng = tmp_path / "texts.jsonl", np.random.default_rng(0)
    words = ["the cat sings", "a dog runs", "old house", "new road", "fast bird"]
    texts.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 6))}) + "\n" for _ in range(200)))
    wanted = Wanted("wordpiece", 120, "encoder", max_length=32)
    lines = texts.read_text().splitlines()
    train_tokenizer(lambda: [json.loads(line)["text"] for line in lines], wanted, tmp_path / "tok")
    built = ("data", "build", texts, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "corpus")
    assert run(capsys, *built, "--eval-fraction", 0.1)[0] == 0
    settings = [
        "task.name=denoising", f"data.tokenizer={tmp_path / 'tok'}", f"data.train={tmp_path / 'corpus/train'}",
        f"data.eval={tmp_path / 'corpus/eval'}", "data.max_length=32", "data.packing=concatenated", "train.batch_size=8", "train.steps=30",
        "train.log_every=10", "optim.learning_rate=1e-2", f"train.out={tmp_path / 'run'}", "train.compilation_cache=null",
    ]  # fmt: skip
    arch = "vocab_size: 120, hidden_size: 32, num_hidden_layers: 1, num_decoder_layers: 1, num_attention_heads: 2, num_decoder_heads: 2, "
    arch += "intermediate_size: 64, decoder_intermediate_size: 64, max_position_embeddings: 32"
    code, _, err = run(capsys, "train", *settings, "model.family=bart", f"model.arch={{{arch}}}")
    assert code == 0, err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    said = refusal(capsys, "train", *settings, "model.family=bert", f"train.out={tmp_path / 'other'}")
    assert "task.name=denoising: bert has no head 'seq2seq_lm'" in said
