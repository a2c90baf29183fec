"""Values and gradients of ModernBERT against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import close, compare, make_reference, ours_of, torch_inputs

from jaxft.errors import UserError
from jaxft.hub.source import open_source
from jaxft.inference.load import load
from jaxft.layers import Compute, Rotary
from jaxft.models.contract import example_batch
from jaxft.models.families import modernbert
from jaxft.models.initial import init_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OFF = {f.name: 0.0 for f in dataclasses.fields(modernbert.Config) if "dropout" in f.name}
SMALL = dataclasses.replace(modernbert.TINY, num_hidden_layers=3, **OFF)
FULL, NEAR = "full_attention", "sliding_attention"
BIASES = {name: True for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cls": ("classification", {}),
    "mean": ("classification", {"classifier_pooling": "mean", "num_labels": 5}),
    "biases": ("classification", BIASES),
    "tokens": ("token_classification", {"num_labels": 9, "local_attention": 2}),
    "masked": ("masked_lm", {}),
    "untied": ("masked_lm", {"tie_word_embeddings": False, "decoder_bias": False, "pad_token_id": None}),
    "masked_biases": ("masked_lm", BIASES | {"classifier_activation": "relu", "hidden_activation": "silu"}),
    "wide_window": ("masked_lm", {"local_attention": 60, "norm_eps": 1e-2}),
    "odd_window": ("masked_lm", {"local_attention": 5}),
    "types": ("masked_lm", {"layer_types": (NEAR, NEAR, FULL)}),
    "all_local": ("masked_lm", {"layer_types": (NEAR,) * 3, "local_rope": Rotary(50.0)}),
    "linear": ("masked_lm", {"global_rope": Rotary(500.0, "linear", 4.0), "local_rope": Rotary(7.0)}),
    "one_layer": ("masked_lm", {"num_hidden_layers": 1}),
    "deeper": ("masked_lm", {"num_hidden_layers": 6, "global_attn_every_n_layers": 3}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_logits_and_every_gradient_equal_the_reference(variant: str, tmp_path: Path) -> None:
    head, changes = VARIANTS[variant]
    compare(modernbert, dataclasses.replace(SMALL, **changes), head, "modernbert", tmp_path)
