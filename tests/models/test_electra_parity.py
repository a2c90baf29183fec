"""Values and gradients of ELECTRA against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import compare_head, drawn, make_reference

from jaxft.errors import UserError
from jaxft.hub.source import make_config
from jaxft.inference.load import load
from jaxft.layers import Compute
from jaxft.models.families import electra
from jaxft.models.initial import init_params, shapes_and_axes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SMALL = dataclasses.replace(electra.TINY, num_hidden_layers=1)
HEADS = [head for head in electra.HEADS if head not in (None, electra.PAIR)]  # tests/tasks has the pair
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "embedding_size": [24, 32, 48],
    "hidden_size": [32, 48],
    "num_hidden_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "intermediate_size": [64, 24],
    "hidden_act": ["gelu", "relu", "gelu_new", "silu"],
    "max_position_embeddings": [40, 20],
    "type_vocab_size": [2, 1, 4],
    "layer_norm_eps": [1e-12, 1e-3],
    "pad_token_id": [0, 7, None],
    "tie_word_embeddings": [True, False],
    "summary_use_proj": [True, False],
    "summary_activation": ["gelu", "", "tanh"],
}
QUICK: list[tuple[str, dict[str, Any]]] = [
    ("classification", {"num_labels": 5, "num_attention_heads": 2, "hidden_act": "relu", "embedding_size": 32}),
    ("masked_lm", {"tie_word_embeddings": False, "pad_token_id": 7, "hidden_act": "silu", "type_vocab_size": 4}),
    ("multiple_choice", {"summary_activation": "tanh", "embedding_size": 48, "layer_norm_eps": 1e-3}),
    ("replaced_tokens", {"pad_token_id": None, "hidden_act": "gelu_new"}),
]


@pytest.mark.parametrize(("head", "changes"), QUICK)
def test_values_and_gradients_equal_the_reference(head: str, changes: dict[str, Any], tmp_path: Path) -> None:
    compare_head(electra, dataclasses.replace(SMALL, **changes), head, "electra", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_random_configs_equal_the_reference(number: int, tmp_path: Path) -> None:
    compare_head(electra, drawn(SMALL, VALUES, number), HEADS[number % len(HEADS)], "electra", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"summary_use_proj": False}, {"summary_activation": ""}, {}])
def test_choices_are_scored_by_every_kind_of_map(changes: dict[str, Any], tmp_path: Path) -> None:
    compare_head(electra, dataclasses.replace(SMALL, **changes), "multiple_choice", "electra", tmp_path)


@pytest.mark.parametrize("head", ["replaced_tokens", pytest.param("masked_lm", marks=pytest.mark.slow)])
def test_a_folder_comes_back_as_it_was(head: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, summary_activation="", summary_use_proj=False, summary_last_dropout=0.3)
    theirs = make_reference(electra, config, head, "electra")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs", note=lambda _: None)
    assert (loaded.model.config, loaded.model.head) == (config, head)
    loaded.save(tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert after["architectures"] == before["architectures"]
    assert {name: after[name] for name in electra.config_to_hf(config)} == {
        name: before[name] for name in electra.config_to_hf(config)
    }
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_map_stands_behind_tables_of_another_width_alone() -> None:
    for width, there in ((24, True), (32, False)):
        model: Any = electra.Model(dataclasses.replace(SMALL, embedding_size=width))
        both: Any = shapes_and_axes(model)
        shapes, axes = both
        assert ("project" in shapes["embed"]) == there
        assert shapes["embed"]["token"]["embedding"].shape == (96, width)
        if there:
            assert shapes["embed"]["project"]["kernel"].shape == (24, 32)
            assert axes["embed"]["project"]["kernel"] == ("embed", "pooled")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"embedding_size": 0}, "embedding_size=0 must be at least 1"),
        ({"pooler": True}, "model.arch: pooler=True is not supported: it is False in this family"),
        ({"summary_last_dropout": 1.5}, "summary_last_dropout=1.5 must lie in 0..1"),
        ({"summary_activation": "gelo"}, "summary_activation='gelo'"),
        ({"type_vocab_size": 0}, "type_vocab_size=0 must be at least 1"),
    ],
)
def test_what_a_config_cannot_be(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(electra, dataclasses.asdict(SMALL) | stated)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_activation_is_null_in_old_files() -> None:
    tree = electra.config_to_hf(SMALL)
    assert electra.config_from_hf(tree | {"summary_activation": None}) == electra.config_from_hf(
        tree | {"summary_activation": ""}
    )


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"summary_proj_to_labels": True}, "summary_proj_to_labels=True is not supported"),
        ({"summary_first_dropout": 0.1}, "summary_first_dropout=0.1 is not supported"),
        ({"is_decoder": True}, "is_decoder=true is not supported"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
    ],
)
def test_what_a_file_cannot_ask_for(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        electra.config_from_hf(electra.config_to_hf(SMALL) | stated)


def test_summaries_that_depend_on_padding_are_refused_where_they_are_used() -> None:
    config, tokens = dataclasses.replace(SMALL, summary_type="mean"), np.ones((1, 3), np.int32)
    model: Any = electra.Model(config, "multiple_choice", Compute())
    with pytest.raises(UserError, match="summary_type='mean' is not supported by the head multiple_choice"):
        jax.eval_shape(model.init, jax.random.key(0), tokens)
    other: Any = electra.Model(config, "replaced_tokens", Compute())
    params = init_params(other, 0)
    assert other.apply({"params": params}, tokens).logits.shape == (1, 3, 1)
