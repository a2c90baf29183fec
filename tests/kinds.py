"""Models that are tested beside a family's TINY: one of each ``model_type`` whose maths differ from those of the family's first."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxft import models
from jaxft.models.families import dinov2, rotary_bert

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
    "dinov2_with_registers": dataclasses.replace(
        dinov2.TINY, model_type="dinov2_with_registers", use_swiglu_ffn=True, num_register_tokens=2
    ),
}
"""``model_type`` -> a Config that tests can afford."""


def tiny_config(name: str) -> Any:
    """The Config that tests can afford of a family, or of a ``model_type`` in KINDS."""
    return KINDS[name] if name in KINDS else models.family(name).TINY


def family_of(name: str) -> str:
    """The family of that name, or that a ``model_type`` in KINDS is of."""
    return models.model_types()[name] if name in KINDS else name


def reads(name: str) -> str:
    """What rows of a family, or of a ``model_type`` in KINDS, are made of."""
    return models.family(name).facts(tiny_config(name)).processor


def reads_text(name: str) -> bool:
    """Whether a family, or a ``model_type`` in KINDS, reads tokens."""
    return reads(name) == "text"


TEXTS = tuple(name for name in models.families() if reads_text(name))
"""Families that read tokens."""
IMAGES = tuple(
    name
    for name in dict.fromkeys((*models.families(), *KINDS))
    if models.family(name).facts(tiny_config(name)).processor == "image"
)
"""Families, and kinds of them, that read pixels."""
