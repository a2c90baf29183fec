"""Values and gradients of DistilBERT against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import close, compare_head, drawn, make_reference

from jaxft.errors import UserError
from jaxft.hub.source import make_config
from jaxft.inference.load import load
from jaxft.layers import Compute
from jaxft.models.families import distilbert
from jaxft.models.initial import init_params, shapes_and_axes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dataclasses.replace(distilbert.TINY, num_hidden_layers=1)
HEADS = [head for head in distilbert.HEADS if head is not None]
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "hidden_size": [32, 48],
    "num_hidden_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "intermediate_size": [64, 24],
    "hidden_act": ["gelu", "relu", "gelu_new", "silu"],
    "max_position_embeddings": [40, 20],
    "pad_token_id": [0, 7, None],
    "tie_word_embeddings": [True, False],
    "sinusoidal_pos_embds": [False, True],
}
QUICK: list[tuple[str, dict[str, Any]]] = [
    ("classification", {"num_labels": 5, "num_attention_heads": 2, "hidden_act": "relu"}),
    ("masked_lm", {"pad_token_id": None, "hidden_act": "silu", "max_position_embeddings": 20}),
    ("masked_lm", {"tie_word_embeddings": False, "pad_token_id": 7, "intermediate_size": 24}),
    ("token_classification", {"num_labels": 3}),
]


@pytest.mark.parametrize(("head", "changes"), QUICK)
def test_values_and_gradients_equal_the_reference(head: str, changes: dict[str, Any], tmp_path: Path) -> None:
    compare_head(distilbert, dataclasses.replace(SMALL, **changes), head, "distilbert", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_random_configs_equal_the_reference(number: int, tmp_path: Path) -> None:
    compare_head(distilbert, drawn(SMALL, VALUES, number), HEADS[number % len(HEADS)], "distilbert", tmp_path)


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, qa_dropout=0.3, seq_classif_dropout=0.4, sinusoidal_pos_embds=True)
    theirs = make_reference(distilbert, config, "classification", "distilbert")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs", note=lambda _: None)
    assert loaded.model.config == config
    loaded.save(tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert after["architectures"] == ["DistilBertForSequenceClassification"]
    assert {name: after[name] for name in distilbert.config_to_hf(config)} == {
        name: before[name] for name in distilbert.config_to_hf(config)
    }
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_keys_are_read_under_both_names_and_written_under_one() -> None:
    stated = {"hidden_size": 48, "num_attention_heads": 3, "n_layers": 5, "num_hidden_layers": 5, "activation": "relu"}
    found = distilbert.config_from_hf(stated)
    theirs = transformers.DistilBertConfig(**stated)
    assert (theirs.dim, theirs.n_heads, theirs.n_layers) == (48, 3, 5)
    assert found == {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 5, "hidden_act": "relu"}
    assert not set(distilbert.SUPERSEDED) & set(distilbert.config_to_hf(SMALL))
    with pytest.raises(UserError, match="hidden_size=48 and dim=32 are one setting: remove one"):
        distilbert.config_from_hf({"dim": 32, "hidden_size": 48})


def test_fresh_positions_are_the_references_sines() -> None:
    config = dataclasses.replace(SMALL, sinusoidal_pos_embds=True, hidden_size=12, max_position_embeddings=30)
    settings = transformers.DistilBertConfig(**distilbert.config_to_hf(config))
    wanted = transformers.DistilBertModel(settings).embeddings.position_embeddings.weight
    model: Any = distilbert.Model(config)
    close(init_params(model, 0)["embed"]["position"]["embedding"], wanted, "positions")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"type_vocab_size": 2}, "model.arch: type_vocab_size=2 is not supported: it is 0 in this family"),
        ({"pooler": True}, "pooler=True is not supported"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 is not supported: it is 1e-12"),
        ({"classifier_dropout": 0.1}, "classifier_dropout=0.1 is not supported"),
        ({"qa_dropout": 1.0}, "qa_dropout=1.0 must lie in 0..1"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"hidden_act": "gelo"}, "hidden_act='gelo'"),
    ],
)
def test_what_a_config_cannot_be(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(distilbert, dataclasses.asdict(SMALL) | stated)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_are_no_token_types() -> None:
    model: Any = distilbert.Model(SMALL, None, Compute())
    assert "type" not in shapes_and_axes(model)[0]["embed"]
    assert "types" not in model.facts.inputs
    tokens = np.ones((1, 3), np.int32)
    with pytest.raises(UserError, match="takes no types="):
        jax.eval_shape(lambda key: model.init(key, tokens, types=tokens), jax.random.key(0))
