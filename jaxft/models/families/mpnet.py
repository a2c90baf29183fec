"""MPNet (Song et al. 2020), as `transformers` computes it (`MPNetModel` and its heads).

An encoder like BERT's without token types. All layers add one learnt bias to the logits of attention, which depends on how far apart
two tokens are; besides, positions are looked up as RoBERTa's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from jaxft.attention.relative import buckets, by_distance, distances
from jaxft.errors import UserError
from jaxft.layers import Compute, declare
from jaxft.models import encoder, encoder_files
from jaxft.models.contract import Array, Head
from jaxft.models.heads import FirstTokenClasses, dense_rules, normal
from jaxft.models.layout import Layout, Rule, Tensors

MODEL_TYPES = {"mpnet": "MPNet"}
_PADDING = 1
"""The token that takes no position, and whose rows look-ups never train: the reference asks no config.json for it."""
_BUCKETS, _FARTHEST = 32, 128
"""How many ranges of distances are told apart, and from where on all distances are one range; likewise."""


@dataclass(frozen=True)
class Config(encoder.EncoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 30527
    type_vocab_size: int = 0
    pad_token_id: int | None = 1
    """Rows are filled up with it. Positions are counted over tokens that are not number 1, whatever it is."""
    relative_attention_num_buckets: int = 32
    """Rows of the table of biases; no more than 32 are used."""

    FIXED: ClassVar[Mapping[str, object]] = {"type_vocab_size": 0, "classifier_dropout": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_position_embeddings < _PADDING + 2:
            raise UserError(
                f"model.arch: max_position_embeddings={self.max_position_embeddings} must be at least {_PADDING + 2}: "
                f"rows up to number {_PADDING} are no token's position"
            )
        if self.relative_attention_num_buckets < _BUCKETS:
            raise UserError(
                f"model.arch: relative_attention_num_buckets={self.relative_attention_num_buckets} must be at least {_BUCKETS}"
            )

    @property
    def limit(self) -> int:
        """Tokens that a row may have: the position table's rows behind that of padding."""
        return self.max_position_embeddings - _PADDING - 1

    def places(self, tokens: Array, positions: Array | None) -> Array:
        """Where each token's position is looked up: [B, S] int32."""
        if positions is not None:
            return positions + _PADDING + 1
        there = jnp.not_equal(tokens, _PADDING).astype(jnp.int32)
        return jnp.cumsum(there, axis=1) * there + _PADDING

    def untrained_place(self) -> int | None:
        """The row of padding, as with torch's ``padding_idx``."""
        return _PADDING

    def untrained_token(self) -> int | None:
        """Likewise."""
        return _PADDING

    def bias_of_places(self, compute: Compute) -> nn.Module | None:
        """By distance."""
        return RelativeBias(self, compute, name="relative")


TINY = Config(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=42,
)


class RelativeBias(nn.Module):
    """What is added to the logits of attention, [1, N, S, S] float32: of each head, a number for each range of distances."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, length: int) -> Array:
        c, dtype = self.config, self.compute.param_dtype
        shape = (c.relative_attention_num_buckets, c.num_attention_heads)
        table = declare(self, "embedding", normal(c), (None, "heads"), shape, dtype)
        each = table[buckets(distances(length), _BUCKETS, _FARTHEST)].astype(jnp.float32).T
        rows = jnp.broadcast_to(each[:, None], (each.shape[0], length, each.shape[1]))
        return self.compute.rules.constrain(by_distance(rows)[None], None, "act_heads", "length", None)


SUPERSEDED = ("position_embedding_type",)
facts = encoder.facts
_SAME_NAME = tuple(name for name in encoder_files.SAME_NAME if name not in Config.FIXED)


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's."""
    return {name: hf[name] for name in (*_SAME_NAME, "relative_attention_num_buckets") if name in hf}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return {name: getattr(config, name) for name in (*_SAME_NAME, "relative_attention_num_buckets")}


HEADS: Mapping[str | None, Head] = {
    None: Head("Model"),
    "classification": Head(
        "ForSequenceClassification",
        lambda c, compute, name: FirstTokenClasses(
            c.hidden_size, c.num_labels, c.hidden_dropout_prob, compute, normal(c), name=name
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


_LAYERS = encoder_files.LayerNames(
    heads=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return encoder_files.hf_layout(
        config, head, HEADS, "mpnet", decoder="lm_head.decoder.weight", others=("lm_head.*",), layers=_LAYERS,
        more=(Rule("relative/embedding", "mpnet.encoder.relative_attention_bias.weight"),),
    )  # fmt: skip


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    classes = ("classifier.out_proj.weight", "classifier.weight")
    return encoder_files.config_of_weights(weights, classes, "lm_head.decoder.weight")
