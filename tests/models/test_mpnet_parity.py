"""Values and gradients of MPNet against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import close, compare_head, drawn, make_reference, ours_of, torch_inputs

from jaxft.attention.relative import buckets, by_distance, distances
from jaxft.errors import UserError
from jaxft.hub.source import make_config
from jaxft.inference.load import load
from jaxft.layers import Compute
from jaxft.models.example import example_batch
from jaxft.models.families import mpnet
from jaxft.models.initial import init_params

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SMALL = dataclasses.replace(mpnet.TINY, num_hidden_layers=1)
HEADS = [head for head in mpnet.HEADS if head is not None]
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "hidden_size": [32, 48],
    "num_hidden_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "intermediate_size": [64, 24],
    "hidden_act": ["gelu", "relu", "gelu_new", "silu"],
    "max_position_embeddings": [42, 22, 14],
    "layer_norm_eps": [1e-12, 1e-3],
    "pad_token_id": [1, 0, 7, None],
    "relative_attention_num_buckets": [32, 40],
    "tie_word_embeddings": [True, False],
    "num_labels": [2, 3, 5],
}
QUICK: list[tuple[str, dict[str, Any]]] = [
    ("classification", {"num_labels": 5, "num_attention_heads": 2, "hidden_act": "relu", "num_hidden_layers": 2}),
    ("masked_lm", {"tie_word_embeddings": False, "pad_token_id": 7, "layer_norm_eps": 1e-3}),
]


@pytest.mark.parametrize(("head", "changes"), QUICK)
def test_values_and_gradients_equal_the_reference(head: str, changes: dict[str, Any], tmp_path: Path) -> None:
    compare_head(mpnet, dataclasses.replace(SMALL, **changes), head, "mpnet", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_random_configs_equal_the_reference(number: int, tmp_path: Path) -> None:
    head = HEADS[number % len(HEADS)]
    config = drawn(SMALL, VALUES, number)
    # The reference makes the two ends of an answer with as many outputs as there are labels.
    config = dataclasses.replace(config, num_labels=2) if head == "question_answering" else config
    if head == "question_answering" and config.limit < 20:  # its answers end at token 19
        config = dataclasses.replace(config, max_position_embeddings=22)
    compare_head(mpnet, config, head, "mpnet", tmp_path)


def test_ranges_of_distances_are_the_references() -> None:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    far = distances(700)
    np.testing.assert_array_equal(
        buckets(far, 32, 128), MPNetEncoder.relative_position_bucket(torch.tensor(far)).numpy()
    )


@pytest.mark.parametrize("length", [1, 2, 5])
def test_distances_become_keys(length: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, length, 2 * length - 1)).astype(np.float32)
    wanted = [[x[:, s, t - s + length - 1] for t in range(length)] for s in range(length)]
    np.testing.assert_array_equal(by_distance(jnp.asarray(x)), np.moveaxis(np.array(wanted), 2, 0))
    with pytest.raises(ValueError, match=f"there are {2 * length - 1}"):
        by_distance(jnp.zeros((length, 2 * length)))


@pytest.mark.parametrize("layers", ["unrolled", pytest.param("scanned", marks=pytest.mark.slow)])
def test_states_and_attentions_are_the_references_with_padding_inside_a_row(layers: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, num_hidden_layers=2)
    theirs = make_reference(mpnet, config, None, "mpnet")
    params = ours_of(mpnet, theirs, config, None, tmp_path)[1]
    model: Any = mpnet.Model(config, None, Compute(layers=layers))
    batch = example_batch(mpnet.facts(config), 3, length=12)
    batch["tokens"][0, 4] = batch["tokens"][1, 0] = 1
    out = model.apply({"params": params}, **batch, hidden_states=True, attentions=True)
    with torch.no_grad():
        wanted = theirs(**torch_inputs(batch), output_hidden_states=True, output_attentions=True)
    seen = batch["mask"].astype(bool)
    close(out.pooled, wanted.pooler_output, "pooled")
    for ours, state in zip(out.hidden_states, wanted.hidden_states, strict=True):
        close(ours[seen], state[torch.tensor(seen)], "state")
    for ours, looked in zip(out.attentions, wanted.attentions, strict=True):
        close(np.asarray(ours).swapaxes(1, 2)[seen], looked.transpose(1, 2)[torch.tensor(seen)], "attention")


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, relative_attention_num_buckets=40, pad_token_id=0)
    theirs = make_reference(mpnet, config, "classification", "mpnet")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs", note=lambda _: None)
    assert loaded.model.config == dataclasses.replace(config, pooler=False)
    loaded.save(tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert after["architectures"] == ["MPNetForSequenceClassification"]
    assert {name: after[name] for name in mpnet.config_to_hf(config)} == {
        name: before[name] for name in mpnet.config_to_hf(config)
    }
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow  # rows that hold several texts are tried in tests/tasks/test_packed_texts.py
def test_packed_texts_equal_texts_of_their_own() -> None:
    model: Any = mpnet.Model(dataclasses.replace(SMALL, num_hidden_layers=2), "token_classification", Compute())
    params = init_params(model, 0)
    tokens = np.random.default_rng(0).integers(5, 96, (1, 25)).astype(np.int32)
    segments = np.repeat([1, 2, 3], [4, 6, 15])[None]
    positions = np.concatenate([np.arange(n) for n in (4, 6, 15)])[None]
    packed = model.apply({"params": params}, tokens, segments=segments, positions=positions).logits[0]
    for number in (1, 2, 3):
        chosen = segments[0] == number
        alone = model.apply({"params": params}, tokens[:, chosen]).logits[0]
        np.testing.assert_allclose(packed[chosen], alone, atol=2e-6)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"type_vocab_size": 2}, "model.arch: type_vocab_size=2 is not supported: it is 0 in this family"),
        ({"classifier_dropout": 0.1}, "classifier_dropout=0.1 is not supported"),
        ({"relative_attention_num_buckets": 31}, "relative_attention_num_buckets=31 must be at least 32"),
        ({"max_position_embeddings": 2}, "max_position_embeddings=2 must be at least 3"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
    ],
)
def test_what_a_config_cannot_be(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(mpnet, {**dataclasses.asdict(SMALL), **stated})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_has_as_many_tokens_as_there_are_rows_behind_padding() -> None:
    assert mpnet.facts(dataclasses.replace(SMALL, max_position_embeddings=514)).limit == 512
    model: Any = mpnet.Model(SMALL)
    with pytest.raises(UserError, match="beyond the model's position table of 40"):
        jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 41), np.int32))
