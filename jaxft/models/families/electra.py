"""ELECTRA (Clark et al. 2020), as `transformers` computes it (`ElectraModel` and its heads).

An encoder like BERT's, without pooler, whose tables may be narrower than its layers. Generators have the masked-LM head,
discriminators the one that finds replaced tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn

from jaxft.errors import UserError, nearest
from jaxft.layers import ACTIVATIONS, Compute, Linear, dropout
from jaxft.models import encoder, encoder_files
from jaxft.models.checks import check_rate
from jaxft.models.contract import ONE_CHOICE, Array, Features, Head
from jaxft.models.heads import FirstTokenClasses, dense_rules, exact, first_of_texts, normal
from jaxft.models.layout import Layout, Rule, Tensors

MODEL_TYPES = {"electra": "Electra"}


@dataclass(frozen=True)
class Config(encoder.EncoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    embedding_size: int = 128
    """Width of the tables of tokens, positions and types."""
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    pooler: bool = False
    summary_type: str = "first"
    """The vector that scores a choice: of the first token. The reference has others, which depend on padding."""
    summary_use_proj: bool = True
    """The score of a choice begins with an affine map."""
    summary_activation: str = "gelu"
    """Behind that map; empty: none."""
    summary_last_dropout: float = 0.1
    """Before the score of a choice."""

    FIXED: ClassVar[Mapping[str, object]] = {"pooler": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_size < 1:
            raise UserError(f"model.arch: embedding_size={self.embedding_size} must be at least 1")
        check_rate("summary_last_dropout", self.summary_last_dropout)
        if self.summary_activation and self.summary_activation not in ACTIVATIONS:
            raise UserError(
                f"model.arch.summary_activation={self.summary_activation!r}: {nearest(self.summary_activation, ACTIVATIONS)}"
            )

    @property
    def embedding_width(self) -> int:
        """Width of the tables."""
        return self.embedding_size


TINY = Config(
    vocab_size=96,
    embedding_size=24,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
)

SUPERSEDED = encoder_files.SUPERSEDED
facts = encoder.facts
_OWN = ("embedding_size", "summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: the file asks for something else than an encoder with absolute positions, or for another kind of summary.
    """
    for name in ("summary_proj_to_labels", "summary_first_dropout"):
        if hf.get(name):
            raise UserError(f"config.json: {name}={hf[name]!r} is not supported")
    own = {name: hf[name] for name in _OWN if name in hf}
    if own.get("summary_activation", "") is None:  # files of v4
        own["summary_activation"] = ""
    return {**encoder_files.config_from_hf(hf), **own}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return {**encoder_files.config_to_hf(config), **{name: getattr(config, name) for name in _OWN}}


class ReplacedTokens(nn.Module):
    """How much each token seems to be another one's replacement, logits [B, S, 1]: above 0 it is taken for one."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, seen: Features, key: Array | None) -> Array:
        del key
        c, width = self.config, self.config.hidden_size
        x = Linear((width, width), ("embed", "pooled"), self.compute, normal(c), name="dense")(seen.hidden)
        x = ACTIVATIONS[c.hidden_act](x)
        return Linear((width, 1), ("embed", "classes"), exact(self.compute), normal(c), name="linear")(x)


class Choice(nn.Module):
    """How well each row answers its question, from its first token: logits [B, 1]."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, seen: Features, key: Array | None) -> Array:
        c, width, x = self.config, self.config.hidden_size, first_of_texts(seen.hidden, seen.starts)
        if c.summary_type != "first":
            raise UserError(
                f"summary_type={c.summary_type!r} is not supported by the head multiple_choice, only 'first'"
            )
        if c.summary_use_proj:
            x = Linear((width, width), ("embed", "pooled"), self.compute, normal(c), name="dense")(x)
        x = ACTIVATIONS[c.summary_activation](x) if c.summary_activation else x
        x = dropout(x, c.summary_last_dropout, key, self.compute.dropout_bits)
        return Linear((width, ONE_CHOICE), ("embed", "classes"), exact(self.compute), normal(c), name="linear")(x)


def _choice_rules(c: Config) -> tuple[Rule, ...]:
    dense = dense_rules("head/dense", "sequence_summary.summary") if c.summary_use_proj else ()
    return (*dense, *dense_rules("head/linear", "classifier"))


HEADS: Mapping[str | None, Head] = {
    None: Head("Model"),
    "classification": Head(
        "ForSequenceClassification",
        lambda c, compute, name: FirstTokenClasses(
            c.hidden_size, c.num_labels, c.class_dropout, compute, normal(c), "gelu", name=name
        ),
        lambda c: (*dense_rules("head/dense", "classifier.dense"), *dense_rules("head/linear", "classifier.out_proj")),
        marks=("classifier.out_proj.weight",),
        classes="rows",
    ),
    "token_classification": encoder_files.TOKEN_CLASSIFICATION,
    "question_answering": encoder_files.QUESTION_ANSWERING,
    "multiple_choice": Head("ForMultipleChoice", lambda c, compute, name: Choice(c, compute, name=name), _choice_rules),
    "masked_lm": encoder_files.masked_lm(
        "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head", None, "gelu"
    ),
    "replaced_tokens": Head(
        "ForPreTraining",
        lambda c, compute, name: ReplacedTokens(c, compute, name=name),
        lambda c: (
            *dense_rules("head/dense", "discriminator_predictions.dense"),
            *dense_rules("head/linear", "discriminator_predictions.dense_prediction"),
        ),
        marks=("discriminator_predictions.dense.weight",),
    ),
}


class Model(encoder.EncoderModel):
    """The encoder, with a head as asked."""

    HEADS = HEADS


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    others = ("generator_predictions.*", "generator_lm_head.*", "discriminator_predictions.*", "sequence_summary.*")
    return encoder_files.hf_layout(config, head, HEADS, "electra", decoder="generator_lm_head.weight", others=others)


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    classes = ("classifier.out_proj.weight", "classifier.weight")
    return encoder_files.config_of_weights(weights, classes, "generator_lm_head.weight", pooler=None)
