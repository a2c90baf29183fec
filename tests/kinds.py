"""Models that are tested beside a family's TINY: one of each ``model_type`` whose maths differ from those of the family's first."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxft import models
from jaxft.models.families import rotary_bert

_EURO: dict[str, Any] = {
    "type_vocab_size": 0,
    "hidden_dropout_prob": 0.0,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "classifier_pooling": "late",
}
KINDS: dict[str, Any] = {
    "gte": dataclasses.replace(rotary_bert.TINY, model_type="gte", type_vocab_size=1, pad_token_id=1),
    "eurobert": dataclasses.replace(rotary_bert.TINY, model_type="eurobert", **_EURO),
}
"""``model_type`` -> a Config that tests can afford."""


def tiny_config(name: str) -> Any:
    """The Config that tests can afford of a family, or of a ``model_type`` in KINDS."""
    return KINDS[name] if name in KINDS else models.family(name).TINY
