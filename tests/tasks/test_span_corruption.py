"""Stretches that are taken out of texts: how many, which, and what source and target are made of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import refusal, run

from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_training import Wanted, train_tokenizer
from jaxft.errors import UserError
from jaxft.tasks._spans import noise_of, room_of
from jaxft.tasks.span_corruption import Task, sentinels_of

PAD, END, FIRST = 0, 1, 90
TASK = Task(0.3, 2.0, tuple(range(FIRST, FIRST + 30)), (PAD, END), PAD, END)


PREPARED = jax.jit(TASK.prepare)


def batch_of(*texts: list[int], length: int) -> dict[str, Any]:
    tokens = np.zeros((len(texts), length), np.int32)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask), "weights": jnp.ones(len(texts))}


def told(made: dict[str, Any], row: int) -> tuple[list[int], list[int]]:
    """Source and target of a row, without padding."""
    source = np.asarray(made["tokens"][row])[np.asarray(made["mask"][row]) > 0]
    target = np.asarray(made["targets"][row])[np.asarray(made["target_weights"][row]) > 0]
    return source.tolist(), target.tolist()


def put_back(source: list[int], target: list[int]) -> list[int]:
    """The text, from a source whose stretches are written in the target one after the other, as T5's are."""
    stretches: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= FIRST:
            assert token == FIRST + len(stretches)
            stretches[token] = []
        else:
            stretches[FIRST + len(stretches) - 1].append(token)
    assert target[-1] == END
    assert [token for token in source if token >= FIRST] == [*stretches]
    assert all(stretches.values())
    return [one for token in source for one in (stretches[token] if token >= FIRST else [token])]


@pytest.mark.parametrize("seed", range(5))
def test_source_and_target_together_are_the_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [[*rng.integers(5, 80, n).tolist(), END] for n in (40, 23, 7, 2)]
    made = PREPARED(batch_of(*texts, length=48), jax.random.key(seed))
    for row, text in enumerate(texts):
        source, target = told(made, row)
        assert put_back(source, target) == text
        count = len(text) - 1
        noise = min(max(1, round(count * 0.3)), count - 1)
        spans = [token for token in target if token >= FIRST]
        assert len(target) == noise + len(spans) + 1
        assert len(spans) == max(1, min(round(noise / 2.0), noise, count - noise))
        assert source[0] == text[0]  # what stays comes first
        decoder = np.asarray(made["decoder_tokens"][row])[: len(target)].tolist()
        assert decoder == [PAD, *target[:-1]]


def test_a_text_is_corrupted_alike_whatever_stands_beside_it() -> None:
    texts = [[*range(10, 30), END], [*range(40, 75), END]]
    key = jax.random.key(3)
    alone = told(PREPARED(batch_of(texts[0], length=40), key), 0)
    beside = told(PREPARED(batch_of(texts[1], texts[0], length=40), key), 1)
    assert alone == beside
    assert told(PREPARED(batch_of(texts[0], length=40), jax.random.key(4)), 0) != alone


def test_texts_of_one_token_and_rows_of_padding_teach_nothing() -> None:
    made = PREPARED(batch_of([7, END], [], length=8), jax.random.key(0))
    assert told(made, 0) == ([7, END], [])
    assert told(made, 1) == ([], [])
    assert float(TASK.weight(made)) == 0


def test_every_way_to_part_a_text_is_as_likely() -> None:
    # 6 tokens, 3 taken out in 2 stretches: 2 ways to part what is taken out, 2 to part what stays.
    keys = jax.random.split(jax.random.key(0), 4000)
    noise, _, count = jax.vmap(lambda key: noise_of(jnp.int32(6), 8, 0.5, 1.5, key))(keys)
    assert set(np.asarray(count).tolist()) == {2}
    seen = Counter("".join(map(str, row[:6].astype(int))) for row in np.asarray(noise))
    assert set(seen) == {"010011", "011001", "001011", "001101"}
    assert min(seen.values()) > 900


@pytest.mark.parametrize(
    ("length", "density", "mean"), [(1, 0.5, 1.0), (2, 0.15, 3.0), (5, 0.9, 2.0), (64, 0.5, 1.0), (512, 0.15, 3.0)]
)
def test_there_is_room_for_the_longest_target(length: int, density: float, mean: float) -> None:
    room = room_of(length, density, mean)
    counts = jnp.arange(1, length + 1)
    noise, _, spans = jax.jit(jax.vmap(lambda n: noise_of(n, length, density, mean, jax.random.key(0))))(counts)
    assert int(spans.max()) <= room.spans
    assert int((noise.sum(1) + spans).max()) + 1 <= room.target
    assert not (noise & (jnp.arange(length) >= counts[:, None])).any()


def test_more_stretches_than_tokens_for_them_are_refused() -> None:
    few = Task(0.3, 2.0, (FIRST, FIRST + 1), (PAD, END), PAD, END)
    with pytest.raises(UserError, match="can have 8 stretches taken out, and the tokenizer has 2 tokens"):
        few.prepare(batch_of([5, 6, 7], length=50), jax.random.key(0))


@pytest.mark.parametrize("packing", ["concatenated", pytest.param("none", marks=pytest.mark.slow)])
def test_pre_train_from_texts(packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    rng = np.random.default_rng(0)
    words = ["the cat sings", "a dog runs", "old house", "new road", "fast bird"]
    texts.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 6))}) + "\n" for _ in range(200)))
    wanted = Wanted("wordpiece", 120, "encoder-decoder", max_length=32, sentinels=8)
    tokenizer = train_tokenizer(
        lambda: [json.loads(line)["text"] for line in texts.read_text().splitlines()], wanted, tmp_path / "tok"
    )
    assert [tokenizer.pieces(np.asarray([one]))[0] for one in sentinels_of(tokenizer)] == [
        f"<extra_id_{n}>" for n in range(8)
    ]
    assert set(sentinels_of(tokenizer)) <= set(Tokenizer(tmp_path / "tok").special_ids)
    rows = [f"data.train={texts}"]
    if packing == "concatenated":
        code, _, err = run(
            capsys,
            "data",
            "build",
            texts,
            "--tokenizer",
            tmp_path / "tok",
            "--out",
            tmp_path / "corpus",
            "--eval-fraction",
            0.1,
        )
        assert code == 0, err
        rows = [f"data.train={tmp_path / 'corpus/train'}", f"data.eval={tmp_path / 'corpus/eval'}"]
    settings = [
        "model.family=t5", "task.name=span_corruption", f"data.tokenizer={tmp_path / 'tok'}", *rows,
        "model.arch={vocab_size: 120, hidden_size: 32, num_hidden_layers: 1, num_decoder_layers: 1, num_attention_heads: 2, head_size: 16, "
        "intermediate_size: 64}", "data.max_length=32", f"data.packing={packing}", "train.batch_size=8", "train.steps=30",
        "train.log_every=10", "optim.learning_rate=1e-2", f"train.out={tmp_path / 'run'}", "train.compilation_cache=null",
        *(["data.buckets=[32]"] if packing == "none" else []),
    ]  # fmt: skip
    code, _, err = run(capsys, "train", *settings)
    assert code == 0, err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert "<extra_id_0>" in (tmp_path / "run" / "export" / "tokenizer.json").read_text()
    told = refusal(
        capsys, "train", *settings, "task.noise_density=0.9", "task.mean_span=1", f"train.out={tmp_path / 'other'}"
    )
    assert "the tokenizer has 8 tokens" in told
