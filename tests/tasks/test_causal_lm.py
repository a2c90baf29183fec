"""Causal language modelling: targets, packing, and the path from text to an exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import rows, run, write_decoder_tokenizer

from jaxft.data.batch import text_fields, text_shape
from jaxft.data.examples import Split, offsets_of
from jaxft.data.loader import Batches
from jaxft.data.packing import pack
from jaxft.tasks.causal_lm import Task


def split_of(lengths: list[int]) -> Split:
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    columns = {"tokens": tokens, "types": 0 * tokens}
    return Split("train", text_fields(0), columns, {"length": offsets_of(np.array(lengths))})


def test_targets_are_the_next_tokens_of_the_same_text() -> None:
    batch = {
        "tokens": jnp.asarray([[5, 6, 7, 8, 9, 0]]),
        "mask": jnp.asarray([[1, 1, 1, 1, 1, 0]]),
        "weights": jnp.ones(1),
    }
    alone = Task().prepare(batch, jax.random.key(0))
    np.testing.assert_array_equal(alone["targets"], [[6, 7, 8, 9, 0, 0]])
    np.testing.assert_array_equal(alone["target_weights"], [[1, 1, 1, 1, 0, 0]])
    packed = Task().prepare(batch | {"segments": jnp.asarray([[1, 1, 2, 2, 2, 0]])}, jax.random.key(0))
    np.testing.assert_array_equal(packed["target_weights"], [[1, 0, 1, 1, 0, 0]])
    nothing = Task().prepare(batch | {"weights": jnp.zeros(1)}, jax.random.key(0))
    assert float(Task().weight(nothing)) == 0.0


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_packing_keeps_every_text_whole_and_once(lengths: list[int]) -> None:
    split = split_of(lengths)
    packed = pack(split, 16)
    assert packed.sizes("length").max() <= 16
    texts = []
    for row in range(len(packed)):
        tokens, segments, positions = (packed[row][name] for name in ("tokens", "segments", "positions"))
        assert sorted(set(segments)) == list(range(1, segments.max() + 1))
        for number in range(1, segments.max() + 1):
            np.testing.assert_array_equal(positions[segments == number], np.arange((segments == number).sum()))
            texts.append(tuple(tokens[segments == number]))
    expected = [tuple(split[row]["tokens"]) for row in range(len(split))]
    assert sorted(texts) == sorted(expected)
    # No two rows could have been one: best fit never leaves that.
    short = sorted(packed.sizes("length"))[:2]
    assert len(short) < 2 or sum(short) > 16


def test_packing_is_tight_on_text_like_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(3.0, 0.7, 5000).astype(int), 3, 128)
    packed = pack(split_of(lengths.tolist()), 128)
    assert packed.sizes("length").sum() / (len(packed) * 128) > 0.99


def test_packed_batches() -> None:
    packed = pack(split_of([5, 9, 3, 16, 7, 4]), 16)
    batches = Batches(packed, 4, (16,), 0)
    assert batches.shapes() == (text_shape(4, 16),)
    batch = batches[0]
    np.testing.assert_array_equal(batch["segments"] > 0, batch["mask"] == 1)
    assert sorted(batch["tokens"][batch["mask"] == 1]) == list(range(1, 45))


@pytest.mark.parametrize("packing", ["best_fit", pytest.param("none", marks=pytest.mark.slow)])
def test_train_eval_and_export(packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = write_decoder_tokenizer(tmp_path / "tokenizer")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text, _ in rows(200)))
    arch = (
        "model.arch={vocab_size: 64, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 4, "
        "num_key_value_heads: 2, intermediate_size: 32, max_position_embeddings: 32}"
    )
    settings = [
        "task.name=causal_lm", "model.family=llama", arch, f"data.train={texts}", f"data.tokenizer={tokenizer}",
        "data.max_length=24", f"data.packing={packing}", "train.batch_size=8", "train.epochs=4", "log.progress=off",
        "train.compilation_cache=null", "eval.batch_size=8", "eval.metric=loss",
        "optim.learning_rate=1e-2", f"train.out={tmp_path / 'out'}",
    ]  # fmt: skip
    code, out, err = run(capsys, "train", *settings)
    assert code == 0, err
    assert ("packed 180 texts into" in out) == (packing == "best_fit")
    assert "held-out metrics identical" in out
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    evals = [record["loss"] for record in log if record["kind"] == "eval"]
    assert evals[-1] < evals[0]
    # Texts weigh the same, packed or not: eval, which never packs, finds what training found.
    held = rows(30, seed=1)
    (tmp_path / "held.txt").write_text("".join(f"{text}\n" for text, _ in held))
    folder = tmp_path / "scores"
    code, _, err = run(capsys, "eval", tmp_path / "out", f"data.eval={tmp_path / 'held.txt'}", "--out", folder)
    assert code == 0, err
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["predicted_tokens"] == sum(len(text.split()) for text, _ in held)  # all but each first, and the end
    exported = json.loads((tmp_path / "out" / "export" / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForCausalLM"]
