"""BERT (Devlin et al. 2018), as `transformers` computes it (`BertModel` and its heads)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.hf import Layout, Rule
from jaxft.models import encoder
from jaxft.models.contract import Head
from jaxft.models.heads import (
    MaskedLm,
    PooledClasses,
    TokenClasses,
    decoder_rules,
    dense_rules,
    norm_rules,
    normal,
)
from jaxft.weights import Weights
from jaxft.weights.numbers import has_own

MODEL_TYPES = {"bert": "Bert"}


@dataclass(frozen=True)
class Config(encoder.EncoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""


TINY = Config(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
)

SUPERSEDED = encoder.SUPERSEDED
facts, config_from_hf, config_to_hf = encoder.facts, encoder.config_from_hf, encoder.config_to_hf


def _masked_lm_rules(config: Config) -> tuple[Rule, ...]:
    return (
        *dense_rules("head/dense", "cls.predictions.transform.dense"),
        *norm_rules("head/norm", "cls.predictions.transform.LayerNorm"),
        *decoder_rules("cls.predictions.decoder", "cls.predictions.bias", tied=config.tie_word_embeddings),
    )


HEADS: Mapping[str | None, Head] = {
    None: Head("Model"),
    "classification": Head(
        "ForSequenceClassification",
        lambda c, compute, name: PooledClasses(
            c.hidden_size, c.num_labels, c.class_dropout, compute, normal(c), name=name
        ),
        lambda c: dense_rules("head/linear", "classifier"),
        # The classifier of single tokens has the same name, and no pooler.
        marks=("classifier.weight", "*pooler.dense.weight"),
        classes="rows",
        pooled=True,
    ),
    "token_classification": Head(
        "ForTokenClassification",
        lambda c, compute, name: TokenClasses(
            c.hidden_size, c.num_labels, c.class_dropout, compute, normal(c), name=name
        ),
        lambda c: dense_rules("head/linear", "classifier"),
        marks=("classifier.weight",),
        classes="tokens",
    ),
    "masked_lm": Head(
        "ForMaskedLM",
        lambda c, compute, name: MaskedLm(
            *(c.hidden_size, c.vocab_size, c.hidden_act, c.layer_norm_eps, c.tie_word_embeddings),
            *(compute, normal(c)),
            name=name,
        ),
        _masked_lm_rules,
        marks=("cls.predictions.*",),
        read_as=("ForPreTraining",),  # it has both heads of pre-training
    ),
    "next_sentence": Head(
        "ForNextSentencePrediction",
        lambda c, compute, name: PooledClasses(c.hidden_size, 2, 0.0, compute, normal(c), name=name),
        lambda c: dense_rules("head/linear", "cls.seq_relationship"),
        marks=("cls.seq_relationship.weight",),
        pooled=True,
    ),
}


class Model(encoder.EncoderModel):
    """The encoder, with a pooler and head as asked."""

    HEADS = HEADS


# What a task may need that a checkpoint need not have; initialised afresh, and said.
_FRESH = ("head/*", "pooler/*")
# Known, harmless leftovers: buffers, and heads that the task does not use.
_LEFTOVERS = (
    *("*embeddings.position_ids", "*embeddings.token_type_ids", "*pooler.dense.*"),
    *("cls.*", "classifier.*", "qa_outputs.*"),
)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    # A tied decoder may be the only one of the two that a file has.
    tied = ("cls.predictions.decoder.weight",) if head == "masked_lm" and config.tie_word_embeddings else ()
    pooled = HEADS[head].pooled or (head is None and config.pooler)
    pooler = encoder.pooler_rules("bert") if pooled else ()
    rules = (*encoder.encoder_rules("bert", tied), *pooler, *HEADS[head].rules(config))
    return Layout(rules, "bert.", encoder.RENAMED, _LEFTOVERS, _FRESH)


def config_of_weights(weights: Weights) -> dict[str, Any]:
    """What tensors alone say about the Config; believed over config.json."""
    said: dict[str, Any] = {"pooler": any(name.endswith("pooler.dense.weight") for name in weights.names())}
    if "classifier.weight" in weights.names():
        said["num_labels"] = weights.shape("classifier.weight")[0]
    # transformers ties the two only where they are equal, whatever config.json says.
    if has_own(weights, "cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"):
        said["tie_word_embeddings"] = False
    return said
