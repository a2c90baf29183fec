"""T5 and mT5 against `transformers` on torch, in process, in float32: values, gradients, folders, and what is written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import compare_head, drawn
from seq2seq import (
    HEAD,
    check_cache,
    check_folder,
    check_head,
    check_packed,
    check_parity,
    check_texts,
    reference_of,
    without_dropout,
)

from jaxft.attention.relative import buckets
from jaxft.config import LoraConfig
from jaxft.config.generation import GenerationConfig
from jaxft.errors import UserError
from jaxft.hub.pretrained import check_changes
from jaxft.hub.source import make_config, open_source
from jaxft.models.adapters import adapted, merged
from jaxft.models.decoding import generate, write
from jaxft.models.families import t5
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.training.optim.freezing import frozen_mask
from jaxft.trees import paths_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TINY = without_dropout("t5")
MT5 = dataclasses.replace(TINY, model_type="mt5", scale_decoder_outputs=False, gated=True, hidden_act="gelu_new")
V1_1 = dataclasses.replace(
    TINY, gated=True, hidden_act="gelu_new", tie_word_embeddings=False, scale_decoder_outputs=False
)
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "hidden_size": [32, 24],
    "num_hidden_layers": [1, 2, 3],
    "num_decoder_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "head_size": [8, 5],
    "intermediate_size": [64, 24],
    "hidden_act": ["relu", "silu", "gelu_new"],
    "gated": [False, True],
    "relative_attention_num_buckets": [8, 6, 32],
    "relative_attention_max_distance": [20, 128],
    "layer_norm_eps": [1e-6, 1e-3],
    "tie_word_embeddings": [True, False],
    "scale_decoder_outputs": [True, False],
    "decoder_start_token_id": [0, 7],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    {"forced_bos_token_id": 17, "forced_eos_token_id": 19, "suppress_tokens": [20, 21]},
    {"num_beams": 4, "forced_bos_token_id": 17, "begin_suppress_tokens": [11, 12, 13], "early_stopping": "never"},
]


@pytest.mark.parametrize("config", [TINY, MT5, V1_1], ids=["t5", "mt5", "v1.1"])
def test_values_and_gradients_equal_the_reference(config: Any, tmp_path: Path) -> None:
    check_parity("t5", config, HEAD, tmp_path, smoothing=0.1 if config is V1_1 else 0.0)


def test_the_bare_model_equals_the_reference(tmp_path: Path) -> None:
    check_parity("t5", TINY, None, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_random_configs_equal_the_reference(number: int, tmp_path: Path) -> None:
    check_parity("t5", drawn(TINY, VALUES, number), HEAD, tmp_path, smoothing=0.2 * (number % 2))


@pytest.mark.parametrize("config", [TINY, MT5, V1_1], ids=["t5", "mt5", "v1.1"])
def test_folders_come_back_bit_equal(config: Any, tmp_path: Path) -> None:
    check_folder("t5", config, tmp_path)


HEADS = ("classification", "token_classification", "question_answering")


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (kind, head)
        if (kind, head) == ("t5", "token_classification")
        else pytest.param(kind, head, marks=pytest.mark.slow)
        for kind in ("t5", "mt5")
        for head in HEADS
    ],
)
def test_heads_and_their_folders_equal_the_reference(kind: str, head: str, tmp_path: Path) -> None:
    check_head("t5", TINY if kind == "t5" else MT5, head, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("head", HEADS)
def test_heads_of_random_configs_equal_the_reference(head: str, number: int, tmp_path: Path) -> None:
    compare_head(t5, drawn(TINY, VALUES, number), head, "t5", tmp_path)


def test_packed_pairs_and_caches_change_nothing(tmp_path: Path) -> None:
    check_packed("t5", TINY, tmp_path / "packed")
    check_cache("t5", TINY, tmp_path / "cache")


@pytest.mark.parametrize("settings", SETTINGS[:3])
def test_texts_are_those_of_the_reference(settings: dict[str, Any], tmp_path: Path) -> None:
    check_texts("t5", dataclasses.replace(TINY, num_decoder_layers=2), settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(70))
@pytest.mark.parametrize("settings", SETTINGS)
def test_texts_of_random_models_are_those_of_the_reference(
    number: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = drawn(TINY, VALUES, number, 70)
    check_texts(
        "t5", dataclasses.replace(config, num_decoder_layers=config.num_hidden_layers), settings, tmp_path, number
    )


def test_ranges_of_distances_are_those_of_the_reference() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    far = np.arange(-200, 201)
    for count, farthest in ((32, 128), (8, 20), (6, 128)):
        for behind in (True, False):
            theirs = T5Attention._relative_position_bucket(torch.tensor(far), behind, count, farthest)
            np.testing.assert_array_equal(buckets(far, count, farthest, behind=behind), theirs.numpy())


NEWER = {"gated": True, "hidden_act": "gelu_new", "scale_decoder_outputs": False}


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, NEWER),
        ({"feed_forward_proj": "relu"}, {"gated": False, "hidden_act": "relu", "scale_decoder_outputs": True}),
        ({"model_type": "mt5"}, NEWER),
        ({"num_layers": 3}, {"num_hidden_layers": 3, "num_decoder_layers": 3}),
    ],
)
def test_config_json_of_each_version_is_read(stated: dict[str, Any], wanted: dict[str, Any]) -> None:
    made: Any = make_config(t5, t5.config_from_hf({"model_type": "t5", **stated}))
    assert {name: getattr(made, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets=7"),
        ({"relative_attention_max_distance": 3}, "relative_attention_max_distance=3"),
        ({"model_type": "mt5"}, "scale_decoder_outputs=true: mt5 never does"),
        ({"decoder_start_token_id": 96}, "decoder_start_token_id=96 is not among 96 tokens"),
        ({"num_decoder_layers": 0}, "num_decoder_layers=0"),
    ],
)
def test_what_no_model_can_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(TINY, **changes)
    for bad in ({"is_encoder_decoder": False}, {"feed_forward_proj": "a-b-c"}):
        with pytest.raises(UserError, match=r"config\.json"):
            t5.config_from_hf(bad)


def test_adapters_and_freezing_know_both_sides() -> None:
    model: Any = t5.Model(TINY, HEAD)
    adapted_model: Any = adapted(model, LoraConfig(rank=2))
    assert adapted_model.targets == tuple(
        f"{side}/attention/{name}/kernel" for side in ("decoder", "encoder") for name in ("query", "value")
    )
    one: Any = adapted(model, LoraConfig(rank=2, targets=("decoder/cross/*",)))
    assert all(path.startswith("decoder/cross/") for path in one.targets)
    assert len(one.targets) == 4
    frozen = paths_of(frozen_mask(*shapes_and_axes(model), ["encoder/*", "decoder/0-1/*"]))
    assert frozen["encoder/attention/query/kernel"] is True
    assert frozen["encoder_norm/scale"] is False
    assert np.asarray(frozen["decoder/mlp/up/kernel"]).tolist() == [True, True, False]


def test_adapted_models_write_what_merged_ones_do() -> None:
    model: Any = t5.Model(TINY, HEAD)
    adapted_model: Any = adapted(model, LoraConfig(rank=2))
    params = jax.tree.map(lambda leaf: leaf + 0.05, init_params(adapted_model, 0))
    sources = jnp.asarray(np.random.default_rng(0).integers(5, 90, (3, 9)), jnp.int32)
    real = jnp.arange(9) < jnp.asarray([9, 4, 1])[:, None]
    config = GenerationConfig(max_new_tokens=6, num_beams=2, eos_token_id=(1,))
    ours = write(adapted_model, params, config, sources, real)
    wanted = write(model, merged(params, adapted_model.alpha), config, sources, real)
    np.testing.assert_array_equal(ours, wanted)
    prompts = [row[:size].tolist() for row, size in zip(np.asarray(sources), (9, 4, 1), strict=True)]
    texts = generate(model, merged(params, adapted_model.alpha), prompts, config)
    found = [[i for i in row if i not in (-1, 1)] for row in np.asarray(ours).tolist()]
    assert found == texts.tokens


def test_fewer_layers_of_a_side_are_the_first_ones(tmp_path: Path) -> None:
    reference_of("t5", TINY, HEAD).save_pretrained(tmp_path)
    notes: list[str] = []
    source = open_source(str(tmp_path), notes.append, arch={"num_decoder_layers": 2})
    check_changes(source, HEAD, notes.append)
    assert notes == [f"the first 2 of the 3 layers of the decoder in {tmp_path} are used"]
    more = open_source(str(tmp_path), notes.append, arch={"num_hidden_layers": 5})
    with pytest.raises(UserError, match="5 layers of the encoder are asked for, the weights have 2"):
        check_changes(more, HEAD, notes.append)
