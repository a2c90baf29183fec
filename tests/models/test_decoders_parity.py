"""Values, gradients, folders and greedy texts of decoders against `transformers` on torch, in float32, over random tiny configs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoders import case_of, check_generation, check_packed, check_parity, check_round_trip, config_of, without_dropout

from jaxft import models
from jaxft.errors import UserError
from jaxft.layers import Rotary
from jaxft.models.contract import architecture_of

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

G, L = "full_attention", "sliding_attention"
ROPES = (
    Rotary(500.0),
    Rotary(kind="linear", factor=4.0),
    Rotary(kind="dynamic", factor=2.0),
    Rotary(500.0, "yarn", 4.0, original_max_position_embeddings=16),
    Rotary(90.0, "yarn", 2.5, original_max_position_embeddings=8, beta_fast=4.0, beta_slow=0.5, truncate=False, mscale=0.7,
           mscale_all_dim=0.3),
    Rotary(50.0, "yarn", 3.0, original_max_position_embeddings=32, attention_factor=1.3),
    Rotary(500.0, "llama3", 8.0, 1.0, 4.0, 32),
)  # fmt: skip
LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": (96, 101),
    "hidden_size": (32, 48),
    "intermediate_size": (64, 40),
    "num_hidden_layers": (2, 1, 3),
    "num_attention_heads": (4, 8),
    "num_key_value_heads": (2, 1, None, 4),
    "hidden_act": ("silu", "gelu", "relu"),
    "max_position_embeddings": (64, 48),
    "rms_norm_eps": (1e-6, 1e-2),
    "rope": ROPES,
    "pad_token_id": (None, 0),
    "tie_word_embeddings": (False, True),
    "num_labels": (2, 5),
}
"""What each of these families varies; some have further fields."""
ROPED = {"head_dim": (12, 8)}
LOCAL = {"layer_types": (None,), "sliding_window": (None, 6, 2, 30)}
GEMMA: dict[str, Any] = {
    **LIKE_LLAMA,
    **ROPED,
    "attention_bias": (False, True),
    "query_pre_attn_scalar": (10, 3),
    "sliding_window": (6, 2, 30),
    "final_logit_softcapping": (None, 2.0, 30.0),
    "layer_types": (None,),
}
VALUES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": (96, 101),
        "hidden_size": (32, 48),
        "num_hidden_layers": (2, 1, 3),
        "num_attention_heads": (4, 2),
        "intermediate_size": (64, None, 40),
        "hidden_act": ("gelu_new", "relu", "gelu"),
        "max_position_embeddings": (64, 48),
        "layer_norm_eps": (1e-5, 1e-2),
        "scale_attn_weights": (True, True, False),
        "scale_attn_by_inverse_layer_idx": (False, True),
        "pad_token_id": (None, 0),
        "tie_word_embeddings": (True, False),
        "num_labels": (2, 5),
    },
    "llama": {**LIKE_LLAMA, "head_dim": (None, 12), "attention_bias": (False, True), "mlp_bias": (False, True)},
    "qwen2": {**LIKE_LLAMA, **LOCAL, "max_window_layers": (0, 1)},
    "qwen3": {**LIKE_LLAMA, **LOCAL, **ROPED, "max_window_layers": (0, 1), "attention_bias": (False, True)},
    "mistral": {**LIKE_LLAMA, "head_dim": (None, 12), "sliding_window": (None, 6, 2, 30)},
    "olmo2": {**LIKE_LLAMA, "attention_bias": (False, True)},
    "gemma2": {**GEMMA, "attn_logit_softcapping": (None, 1.0, 50.0)},
    "gemma3_text": {
        **GEMMA,
        "rope": tuple(one for one in ROPES if one.truncate),
        "local_rope": (Rotary(7.0), Rotary(90.0)),
    },
    "smollm3": {
        **LIKE_LLAMA,
        **LOCAL,
        "attention_bias": (False, True),
        "mlp_bias": (False, True),
        "no_rope_layers": (None, (0, 1, 0), (1, 1, 1, 0)),
        "no_rope_layer_interval": (2, 1, 3),
    },
}
"""Values that each field of a family's Config takes; those that change nothing of one forward pass are left out."""
CASES = [(family, number) for family in VALUES for number in range(20)]
WINDOWED: dict[str, dict[str, Any]] = {
    "qwen2": {"sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"sliding_window": 6, "max_window_layers": 1},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": (L, G, L)},
    "smollm3": {"sliding_window": 6},
}
"""Families whose layers may have windows, and what gives them one of 6."""


@pytest.mark.sampled(36)
@pytest.mark.parametrize(("family", "number"), CASES)
def test_values_and_gradients_over_random_configs(family: str, number: int, tmp_path: Path) -> None:
    config, head = case_of(family, VALUES[family], number)
    assert head is not None
    check_parity(family, config, head, tmp_path)


HEADS = [(family, head) for family in VALUES for head in models.family(family).HEADS]


@pytest.mark.sampled(13)
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_a_folder_comes_back_bit_for_bit(family: str, head: str | None, tmp_path: Path) -> None:
    for number in (1, 2):
        config, _ = case_of(family, VALUES[family], number)
        check_round_trip(family, config, head, tmp_path / str(number))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("family", VALUES)
def test_greedy_texts_are_the_references(family: str) -> None:
    check_generation(family, without_dropout(family), (9, 1, 4, 17))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", WINDOWED)
def test_windows_shorter_and_longer_than_prompts(family: str) -> None:
    config = dataclasses.replace(without_dropout(family), **WINDOWED[family])
    assert any(kind.window == 6 for kind in config.kinds)
    check_generation(family, config, (3, 6, 13))
    check_packed(family, config)


@pytest.mark.parametrize("family", VALUES)
def test_a_config_that_states_nothing_is_the_references(family: str) -> None:
    """So the sizes that published files leave out are read as the reference reads them."""
    module: Any = models.family(family)
    kind = getattr(transformers, architecture_of(module, None)).config_class
    theirs = kind().to_dict()
    ours = module.config_to_hf(config_of(family, {}))
    lacking = {"classifier_dropout", *(("head_dim",) if "head_dim" not in theirs else ())}
    assert {name: value for name, value in ours.items() if name not in lacking} == {
        name: theirs[name] for name in ours if name not in lacking
    }
    # Types of layers of a model of more layers than tests have.
    assert config_of(family, {}).kinds == config_of(family, json.loads(kind().to_json_string(use_diff=False))).kinds


def test_fields_are_all_varied() -> None:
    # Of one forward pass without dropout, these change nothing.
    idle = {"initializer_range"}
    for family, values in VALUES.items():
        names = {field.name for field in dataclasses.fields(models.family(family).Config)}
        assert {name for name in names if "dropout" not in name} - idle == set(values), family


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true is not supported"),
    ("gpt2", {"n_embd": 32, "hidden_size": 64}, "hidden_size=64 and n_embd=32 are one setting"),
    ("gpt2", {"n_embd": 33, "n_head": 4}, "hidden_size=33 is not a multiple of num_attention_heads=4"),
    ("gpt2", {"activation_function": "gelu_nwe"}, "did you mean 'gelu_new'"),
    ("qwen2", {"num_hidden_layers": 2, "layer_types": [G, L]}, "it takes use_sliding_window=true and a sliding_window"),
    ("qwen2", {"num_hidden_layers": 2, "layer_types": [G]}, "layer_types names 1 layers, num_hidden_layers is 2"),
    ("qwen3", {"num_hidden_layers": 1, "layer_types": ["full"]}, "layer_types: 'full' is not supported"),
    ("qwen3", {"head_dim": 7}, "the head size 7 must be even"),
    ("mistral", {"num_hidden_layers": 2, "layer_types": [G, L]}, "all layers are of sliding_attention"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true is not supported"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 must be above 0"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0 must be above 0"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "the reference does not apply it here"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern=0 must be a whole number"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "must have an object for each of full_attention"),
    ("gemma3_text", {"rope_scaling": "linear"}, "rope_scaling"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0] must be 0 or 1 for each of 36 layers"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0 must be at least 1"),
    ("olmo2", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported"),
    ("olmo2", {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "need a theta other than 1"),
]


def test_old_spellings_of_gemma_3_mean_what_they_mean_to_the_reference() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    small = {"num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    for stated in (
        {"rope_theta": 500.0, "rope_local_base_freq": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 8.0}, "sliding_window_pattern": 2},
        {
            "rope_parameters": {
                G: {"rope_type": "linear", "factor": 4.0},
                L: {"rope_theta": 7.0, "rope_type": "default"},
            }
        },
        {"sliding_window_pattern": 3},
    ):
        theirs = transformers.Gemma3TextConfig.from_dict(small | json.loads(json.dumps(stated)))
        ours = config_of("gemma3_text", small | stated)
        assert list(ours.types) == theirs.layer_types
        wanted = Gemma3RotaryEmbedding(theirs)
        for name, rope in ((G, ours.rope), (L, ours.local_rope)):
            if name in theirs.layer_types:
                np.testing.assert_allclose(rope.frequencies(8), getattr(wanted, f"{name}_inv_freq"), rtol=1e-6)


@pytest.mark.parametrize(("family", "stated", "said"), REFUSED)
def test_what_a_config_cannot_be(family: str, stated: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(family, stated)
    assert said in str(caught.value)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)
