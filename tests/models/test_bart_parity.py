"""BART, mBART, Marian and M2M-100 against `transformers` on torch, in float32: values, gradients, folders, and what is written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

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
    without_dropout,
)

from jaxft import models
from jaxft.errors import UserError
from jaxft.hub.source import make_config
from jaxft.models.families import bart, marian

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BART = without_dropout("bart")
MBART = dataclasses.replace(BART, model_type="mbart", scale_embedding=True, tie_word_embeddings=False)
MARIAN = without_dropout("marian")
M2M100 = without_dropout("m2m100")
KINDS = {"bart": ("bart", BART), "mbart": ("bart", MBART), "marian": ("marian", MARIAN), "m2m100": ("m2m100", M2M100)}
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "hidden_size": [32, 24],
    "num_hidden_layers": [1, 2, 3],
    "num_decoder_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "num_decoder_heads": [4, 1, 2],
    "intermediate_size": [64, 24],
    "decoder_intermediate_size": [40, 64],
    "hidden_act": ["relu", "silu", "gelu", "gelu_new"],
    "max_position_embeddings": [20, 64],
    "scale_embedding": [True, False],
    "tie_word_embeddings": [True, False],
    "pad_token_id": [0, 1],
    "decoder_start_token_id": [0, 7, 2],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    {"forced_bos_token_id": 17, "forced_eos_token_id": 19, "suppress_tokens": [20, 21]},
    {"num_beams": 4, "forced_bos_token_id": 17, "begin_suppress_tokens": [11, 12, 13], "early_stopping": "never"},
]


def random_config(kind: str, number: int) -> Any:
    values = {**VALUES, "decoder_start_token_id": [7, 2]} if kind == "m2m100" else VALUES  # no padding
    config = drawn(KINDS[kind][1], values, number)
    return dataclasses.replace(config, model_type="mbart") if kind == "mbart" else config


DEAR = pytest.mark.slow
ANSWERS = "question_answering"


@pytest.mark.parametrize(
    "kind", [pytest.param("bart", marks=DEAR), "mbart", pytest.param("marian", marks=DEAR), "m2m100"]
)
def test_values_and_gradients_equal_the_reference(kind: str, tmp_path: Path) -> None:
    family, config = KINDS[kind]
    small = dataclasses.replace(config, num_hidden_layers=1, num_decoder_layers=1)
    check_parity(family, small, HEAD, tmp_path, smoothing=0.1 if kind == "mbart" else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_bare_model_equals_the_reference(kind: str, tmp_path: Path) -> None:
    check_parity(*KINDS[kind], None, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_random_configs_equal_the_reference(kind: str, number: int, tmp_path: Path) -> None:
    check_parity(KINDS[kind][0], random_config(kind, number), HEAD, tmp_path, smoothing=0.2 * (number % 2))


@pytest.mark.parametrize("kind", [pytest.param("bart", marks=DEAR), "mbart", "marian"])
def test_folders_come_back_bit_equal(kind: str, tmp_path: Path) -> None:
    check_folder(*KINDS[kind], tmp_path)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("mbart", "classification"),
        *(
            pytest.param(*one, marks=DEAR)
            for one in (("bart", "classification"), ("bart", ANSWERS), ("mbart", ANSWERS))
        ),
    ],
)
def test_heads_and_their_folders_equal_the_reference(kind: str, head: str, tmp_path: Path) -> None:
    config = dataclasses.replace(KINDS[kind][1], num_hidden_layers=1, num_decoder_layers=1)
    check_head("bart", config, head, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("head", ["classification", ANSWERS])
@pytest.mark.parametrize("kind", ["bart", "mbart"])
def test_heads_of_random_configs_equal_the_reference(kind: str, head: str, number: int, tmp_path: Path) -> None:
    compare_head(bart, random_config(kind, number), head, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_packed_pairs_and_caches_change_nothing(kind: str, tmp_path: Path) -> None:
    check_packed(*KINDS[kind], tmp_path / "packed")
    check_cache(*KINDS[kind], tmp_path / "cache")


@pytest.mark.parametrize(("kind", "number"), [pytest.param("mbart", 4, marks=DEAR), ("marian", 1)])
def test_texts_are_those_of_the_reference(kind: str, number: int, tmp_path: Path) -> None:
    family, config = KINDS[kind]
    small = dataclasses.replace(config, num_hidden_layers=1, num_decoder_layers=1)
    check_texts(family, small, SETTINGS[number], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(14))
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_random_models_are_those_of_the_reference(
    number: int, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    config = random_config(kind, number)
    if kind == "m2m100":  # the reference gives padding no position, in what is written neither
        settings = {**settings, "suppress_tokens": [*settings.get("suppress_tokens", ()), config.pad_token_id]}
    same = dataclasses.replace(config, num_decoder_layers=config.num_hidden_layers)
    check_texts(KINDS[kind][0], same, settings, tmp_path, number)


def test_layers_are_left_out_of_training_steps_as_often_as_asked() -> None:
    import jax
    import numpy as np

    from jaxft.attention import MaskSpec
    from jaxft.layers import Compute, unlabel
    from jaxft.models.bart_like import Layer

    layer = Layer(dataclasses.replace(BART, decoder_layerdrop=0.25), Compute(), "decoder")
    x, arguments = np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32), (MaskSpec(causal=True), None)
    params, _ = unlabel(layer.init(jax.random.key(0), x, None, *arguments)["params"])
    step = jax.jit(jax.vmap(lambda key: layer.apply({"params": params}, x, key, *arguments)))
    found = np.asarray(step(jax.random.split(jax.random.key(1), 400)))
    whole = np.asarray(layer.apply({"params": params}, x, None, *arguments))
    left = (found == x).all((1, 2, 3))
    assert 60 < left.sum() < 140
    np.testing.assert_allclose(found[~left], np.broadcast_to(whole, found[~left].shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "stated", "wanted"),
    [
        ("bart", {"encoder_layers": 3, "num_hidden_layers": 3}, {"num_hidden_layers": 3, "num_decoder_layers": 12}),
        ("bart", {"normalize_before": False, "normalize_embedding": True}, {"pre_norms": False, "limit": 1024}),
        ("bart", {"model_type": "mbart", "normalize_before": True}, {"pre_norms": True, "decoder_start_token_id": 2}),
        (
            "marian",
            {"static_position_embeddings": True, "normalize_embedding": False},
            {"decoder_start_token_id": 58100},
        ),
    ],
)
def test_config_json_of_each_version_is_read(family: str, stated: dict[str, Any], wanted: dict[str, Any]) -> None:
    module = models.family(family)
    made: Any = make_config(module, module.config_from_hf({"model_type": family, **stated}))
    assert {name: getattr(made, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("family", "stated", "message"),
    [
        ("bart", {"normalize_before": True}, "normalize_before=True is not supported"),
        ("bart", {"is_encoder_decoder": False}, "is_encoder_decoder=false is not supported"),
        (
            "bart",
            {"encoder_layers": 3, "num_hidden_layers": 4},
            "num_hidden_layers=4 and encoder_layers=3 are one setting",
        ),
        ("marian", {"static_position_embeddings": False}, "static_position_embeddings=False is not supported"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=false"),
    ],
)
def test_files_of_other_models_are_refused(family: str, stated: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        models.family(family).config_from_hf(stated)
    assert len(str(raised.value)) <= 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decoder_heads": 3}, "hidden_size=32 is not a multiple of num_decoder_heads=3"),
        ({"decoder_start_token_id": 96}, "decoder_start_token_id=96 is not among 96 tokens"),
        ({"decoder_layerdrop": 1.0}, "decoder_layerdrop=1.0"),
        ({"model_type": "pegasus"}, "model_type='pegasus' is neither bart nor mbart"),
    ],
)
def test_what_no_model_can_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(BART, **changes)


class Held:
    """Tensors in memory."""

    def __init__(self, **tensors: Any) -> None:
        self.tensors = {name.replace("__", "."): value for name, value in tensors.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> Any:
        return self.tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> Any:
        return self.tensors[name][start:stop]


def test_tables_that_would_not_be_read_are_refused() -> None:
    import numpy as np

    one, other = np.ones((4, 2), np.float32), np.zeros((4, 2), np.float32)
    with pytest.raises(UserError, match=r"decoder.embed_tokens.weight differs from shared.weight"):
        bart.config_of_weights(Held(shared__weight=one, decoder__embed_tokens__weight=other))
    with pytest.raises(UserError, match=r"encoder.embed_positions.weight: is not the table of sinusoids"):
        marian.config_of_weights(Held(encoder__embed_positions__weight=one))
    kept = Held(encoder__embed_positions__weight=marian.sinusoids(4, 2), shared__weight=one)
    assert marian.config_of_weights(kept) == {}


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_several_ends_of_texts_are_kept_as_a_folder_says(family: str) -> None:
    module = models.family(family)
    said = module.config_to_hf(module.TINY) | {"eos_token_id": [1, 7], "model_type": family}
    fields = module.config_from_hf(said)
    assert fields["eos_token_id"] is None
    assert {**said, **module.config_to_hf(module.Config(**fields))}["eos_token_id"] == [1, 7]
    assert module.config_from_hf(said | {"eos_token_id": [7]})["eos_token_id"] == 7
