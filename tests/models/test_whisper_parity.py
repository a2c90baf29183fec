"""Whisper against `transformers` on torch, in process, in float32: values, losses, every gradient, folders that come back."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import close, drawn, make_reference, mean_loss, ours_of

from jaxft import models
from jaxft.errors import UserError
from jaxft.hub.convert import export_tensors
from jaxft.hub.source import make_config, open_source
from jaxft.inference.load import load
from jaxft.models.caches import init_cache
from jaxft.models.example import example_batch
from jaxft.models.families import whisper
from jaxft.models.initial import init_params
from jaxft.models.spec_augment import Spans, covered, masked

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

HEAD = whisper.SPEECH_TO_TEXT
SMALL = dataclasses.replace(whisper.TINY, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "hidden_size": [32, 24],
    "num_hidden_layers": [1, 2, 3],
    "num_decoder_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "num_decoder_heads": [4, 1, 2],
    "intermediate_size": [64, 24],
    "decoder_intermediate_size": [40, 64],
    "hidden_act": ["gelu", "relu", "gelu_new"],
    "max_position_embeddings": [20, 64],
    "max_source_positions": [7, 24, 1],
    "num_mel_bins": [8, 5, 128, 80],
    "tie_word_embeddings": [True, False],
    "pad_token_id": [0, 1],
    "decoder_start_token_id": [0, 7, 2],
}


def reference_of(config: Any, head: str | None = HEAD, seed: int = 0) -> Any:
    """A model of the reference with random parameters, those of frozen positions too; its vocabulary is a matrix of its own where ours
    is."""
    theirs = make_reference(models.family("whisper"), config, head, "whisper", seed)
    encoder = theirs.encoder if head is None else theirs.model.encoder
    with torch.no_grad():
        encoder.embed_positions.weight.add_(0.1 * torch.randn_like(encoder.embed_positions.weight))
    if head is not None and not config.tie_word_embeddings:
        matrix = theirs.proj_out.weight.detach().clone()
        theirs.proj_out.weight = torch.nn.Parameter(matrix + torch.randn_like(matrix) * 0.1)
    return theirs


def theirs_of(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "input_features": torch.tensor(batch["frames"].transpose(0, 2, 1).copy()),
        "decoder_input_ids": torch.tensor(batch["decoder_tokens"].astype(np.int64)),
        "decoder_attention_mask": torch.tensor(batch["decoder_mask"]),
    }


def check_parity(config: Any, folder: Path) -> None:
    """Holds the encoder's vectors, logits, loss and the gradient of every parameter against the reference's."""
    module, theirs = models.family("whisper"), reference_of(config)
    model, params = ours_of(module, theirs, config, HEAD, folder)
    batch = example_batch(model.facts, 4, length=20)
    seen = batch["decoder_mask"].astype(bool)
    labels = np.where(seen, np.random.default_rng(1).integers(0, config.vocab_size, seen.shape), -100)

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        out = model.apply({"params": params}, **batch)
        return mean_loss(out.logits, labels), out

    (loss, out), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    expected = theirs(**theirs_of(batch))
    wanted = torch.nn.functional.cross_entropy(expected.logits.flatten(0, 1), torch.tensor(labels).flatten())
    wanted.backward()
    close(out.memory, expected.encoder_last_hidden_state, "memory")
    close(np.asarray(out.logits)[seen], expected.logits[seen], "logits")
    close(loss, wanted, "loss")
    named = dict(theirs.named_parameters(remove_duplicate=False))
    for tensor in export_tensors(gradient, module.hf_layout(config, HEAD), bare=False):
        of_theirs = named[tensor.name]
        close(tensor.read(), of_theirs.grad if of_theirs.requires_grad else torch.zeros_like(of_theirs), tensor.name)


def test_values_losses_and_gradients_equal_the_reference(tmp_path: Path) -> None:
    check_parity(dataclasses.replace(SMALL, num_hidden_layers=1, num_decoder_layers=2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_random_configs_equal_the_reference(number: int, tmp_path: Path) -> None:
    check_parity(drawn(SMALL, VALUES, number), tmp_path)


@pytest.mark.slow
def test_the_bare_model_equals_the_reference(tmp_path: Path) -> None:
    theirs = reference_of(SMALL, None)
    model, params = ours_of(models.family("whisper"), theirs, SMALL, None, tmp_path)
    batch = example_batch(model.facts, 4, length=20)
    out, expected = jax.jit(model.apply)({"params": params}, **batch), theirs(**theirs_of(batch))
    seen = batch["decoder_mask"].astype(bool)
    close(out.memory, expected.encoder_last_hidden_state, "memory")
    close(np.asarray(out.hidden)[seen], expected.last_hidden_state[seen], "hidden")


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_folders_come_back_bit_equal(tied: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = dataclasses.replace(SMALL, tie_word_embeddings=tied, mask_time_prob=0.1, apply_spec_augment=True)
    theirs = reference_of(config)
    theirs.generation_config.suppress_tokens = [3, 4]
    theirs.save_pretrained(tmp_path / "theirs")
    source = open_source(str(tmp_path / "theirs"), lambda text: pytest.fail(text))
    assert (source.head, source.config) == (HEAD, config)
    load(tmp_path / "theirs", note=lambda text: None).save(tmp_path / "ours")
    stored, written = (load_file(tmp_path / which / "model.safetensors") for which in ("theirs", "ours"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)
    kept = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert kept["suppress_tokens"] == [3, 4]
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    batch = theirs_of(example_batch(whisper.facts(config), 2, length=20))
    with torch.no_grad():
        ours, wanted = (one(**batch).logits for one in (again, theirs))
    assert torch.equal(ours, wanted)


@pytest.mark.slow
def test_a_cache_changes_nothing(tmp_path: Path) -> None:
    model, params = ours_of(models.family("whisper"), reference_of(SMALL), SMALL, HEAD, tmp_path)
    batch = example_batch(model.facts, 3, length=16)
    whole = np.asarray(jax.jit(model.apply)({"params": params}, batch["frames"], batch["decoder_tokens"]).logits)
    cache, parts = init_cache(model, 3, 10), []
    for first, last in ((0, 3), (3, 4), (4, 8)):
        frames, tokens = batch["frames"] if first == 0 else None, batch["decoder_tokens"][:, first:last]
        out = model.apply({"params": params}, frames, tokens, cache=cache)
        cache = out.cache
        parts.append(np.asarray(out.logits))
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_texts_of_one_stretch_do_not_see_each_other() -> None:
    small = dataclasses.replace(SMALL, num_hidden_layers=1, num_decoder_layers=1)
    model, frames = whisper.Model(small, HEAD), example_batch(whisper.facts(small), 1)["frames"]
    params = init_params(model, 0)
    texts = [np.array([[1, 9, 12]]), np.array([[1, 20, 33, 7, 50]])]
    apply = jax.jit(model.apply)
    alone = [np.asarray(apply({"params": params}, frames, text).logits[0]) for text in texts]
    packed = {
        "decoder_tokens": np.concatenate(texts, 1),
        "decoder_positions": np.array([[0, 1, 2, 0, 1, 2, 3, 4]]),
        "decoder_segments": np.array([[1, 1, 1, 2, 2, 2, 2, 2]]),
    }
    together = np.asarray(apply({"params": params}, frames, **packed).logits[0])
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-5)


def test_calls_that_cannot_be_answered_are_refused_in_one_line() -> None:
    model, batch = whisper.Model(SMALL, HEAD), example_batch(whisper.facts(SMALL), 2)
    params = init_params(model, 0)
    for changed, message in (
        ({"frames": batch["frames"][:, :40]}, "frames of the shape (40, 8): the model reads 48 frames of 8 bins"),
        ({"frames": batch["frames"][..., :5]}, "frames of the shape (48, 5)"),
        ({"frames": None}, "needs a source: give frames"),
        ({"tokens": batch["decoder_tokens"]}, "takes no tokens="),
        ({"decoder_tokens": np.ones((2, 65), np.int32), "decoder_mask": None}, "target of 65 tokens is beyond"),
    ):
        changed_batch: Any = batch | changed
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            model.apply({"params": params}, **changed_batch)
        assert len(str(raised.value)) <= 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_embedding": True}, "scale_embedding=true"),
        ({"hidden_size": 33, "num_attention_heads": 1, "num_decoder_heads": 1}, "hidden_size=33"),
        ({"num_mel_bins": 0}, "num_mel_bins=0 must be at least 1"),
        ({"mask_time_prob": 1.5}, "mask_time_prob=1.5 must lie in 0..1"),
        ({"apply_spec_augment": True, "mask_time_length": 49}, "mask_time_length=49 is more than the 48 there are"),
    ],
)
def test_what_no_model_can_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(SMALL, **changes)


def test_published_config_files_are_read() -> None:
    stated = {
        "model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "num_hidden_layers": 32, "decoder_layers": 4,
        "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120,
        "num_mel_bins": 128, "vocab_size": 51866, "scale_embedding": False, "decoder_start_token_id": 50258,
        "max_source_positions": 1500, "max_target_positions": 448, "is_encoder_decoder": True,
    }  # fmt: skip
    made: Any = make_config(whisper, whisper.config_from_hf(stated))
    facts = whisper.facts(made)
    assert facts.inputs["frames"].axes == ("batch", 3000, 128)
    assert (facts.limit, facts.start, facts.vocabulary, facts.reads) == (448, 50258, 51866, "frames")
    assert {name: whisper.config_to_hf(made)[name] for name in stated.keys() & whisper.config_to_hf(made).keys()} == {
        name: stated[name] for name in stated.keys() & whisper.config_to_hf(made).keys()
    }


def test_spans_have_the_lengths_and_numbers_of_the_reference() -> None:
    from transformers.models.whisper.modeling_whisper import _compute_mask_indices

    spans, size = Spans(0.3, 4, 2), 50
    ours = np.asarray(covered(jax.random.key(0), 4000, size, spans))
    np.random.seed(0)
    theirs = np.concatenate([_compute_mask_indices((40, size), 0.3, 4, min_masks=2) for _ in range(100)])
    # The share of each place, at the ends too, and how many places there are.
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.03)
    np.testing.assert_allclose(ours.sum(1).mean(), theirs.sum(1).mean(), rtol=0.02)
    edges = np.diff(np.pad(ours, ((0, 0), (1, 1))).astype(int), axis=1)
    runs = [np.flatnonzero(row == -1) - np.flatnonzero(row == 1) for row in edges]
    assert min(run.min() for run in runs) == 4


@pytest.mark.slow
def test_training_steps_see_frames_without_spans_where_asked() -> None:
    spans = {"mask_time_prob": 0.5, "mask_feature_prob": 0.5, "mask_feature_length": 2}
    config = dataclasses.replace(SMALL, num_hidden_layers=1, num_decoder_layers=1, apply_spec_augment=True, **spans)
    frames = jnp.ones((2, 48, 8))
    seen = np.asarray(masked(frames, jax.random.key(1), config.time_spans, config.bin_spans))
    assert 0 < seen.mean() < 1
    assert (seen[0] != seen[1]).any()
    model, batch = whisper.Model(config, HEAD), example_batch(whisper.facts(config), 2)
    params = init_params(model, 0)
    apply = jax.jit(model.apply)
    plain, one, other = (
        apply({"params": params}, **batch, key=key).memory for key in (None, jax.random.key(0), jax.random.key(1))
    )
    assert float(jnp.abs(plain - one).max()) > 1e-3
    assert float(jnp.abs(one - other).max()) > 1e-3
    same = dataclasses.replace(config, apply_spec_augment=False)
    again = jax.jit(whisper.Model(same, HEAD).apply)({"params": params}, **batch, key=jax.random.key(0)).memory
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-5)
