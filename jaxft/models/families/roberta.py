"""RoBERTa (Liu et al. 2019), XLM-RoBERTa and CamemBERT, as `transformers` computes them (`RobertaModel` and its heads).

An encoder like BERT's. Positions are looked up from the row behind that of padding on, and counted over tokens that are no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.models import encoder, encoder_files
from jaxft.models.contract import Array, Head
from jaxft.models.heads import FirstTokenClasses, dense_rules, normal
from jaxft.models.layout import Layout, Tensors

MODEL_TYPES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}


@dataclass(frozen=True)
class Config(encoder.EncoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 50265
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id is None or not 0 <= self.pad_token_id < self.max_position_embeddings - 1:
            raise UserError(f"model.arch: pad_token_id={self.pad_token_id}: positions are counted from it, give one")

    @property
    def limit(self) -> int:
        """Tokens that a row may have: the position table's rows behind that of padding."""
        return self.max_position_embeddings - self._first

    @property
    def _first(self) -> int:
        return (self.pad_token_id or 0) + 1

    def places(self, tokens: Array, positions: Array | None) -> Array:
        """Where each token's position is looked up: [B, S] int32."""
        if positions is not None:
            return positions + self._first
        there = jnp.not_equal(tokens, self.pad_token_id or 0).astype(jnp.int32)
        return jnp.cumsum(there, axis=1) * there + self._first - 1

    def untrained_place(self) -> int | None:
        """The row of padding, as with torch's ``padding_idx``."""
        return self.pad_token_id


TINY = Config(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=42,
    type_vocab_size=1,
)

SUPERSEDED = encoder_files.SUPERSEDED
facts, config_from_hf, config_to_hf = encoder.facts, encoder_files.config_from_hf, encoder_files.config_to_hf


HEADS: Mapping[str | None, Head] = {
    None: Head("Model"),
    "classification": Head(
        "ForSequenceClassification",
        lambda c, compute, name: FirstTokenClasses(
            c.hidden_size, c.num_labels, c.class_dropout, compute, normal(c), name=name
        ),
        lambda c: (*dense_rules("head/dense", "classifier.dense"), *dense_rules("head/linear", "classifier.out_proj")),
        marks=("classifier.out_proj.weight",),
        classes="rows",
    ),
    "token_classification": encoder_files.TOKEN_CLASSIFICATION,
    "question_answering": encoder_files.QUESTION_ANSWERING,
    "multiple_choice": encoder_files.multiple_choice(lambda c: c.hidden_dropout_prob),
    "masked_lm": encoder_files.masked_lm(
        "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", "gelu"
    ),
}


class Model(encoder.EncoderModel):
    """The encoder, with a pooler and head as asked."""

    HEADS = HEADS


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return encoder_files.hf_layout(
        config, head, HEADS, "roberta", decoder="lm_head.decoder.weight", others=("lm_head.*",)
    )


def config_of_weights(weights: Tensors) -> dict[str, Any]:
    """What tensors alone say about the Config; believed over config.json."""
    return encoder_files.config_of_weights(
        weights, ("classifier.out_proj.weight", "classifier.weight"), "lm_head.decoder.weight"
    )
