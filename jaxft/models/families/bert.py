"""BERT (Devlin et al. 2018), as `transformers` computes it (`BertModel` and its heads)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.models import encoder, encoder_files
from jaxft.models.contract import Head
from jaxft.models.heads import PooledClasses, dense_rules, normal
from jaxft.models.layout import Layout, Tensors

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

SUPERSEDED = encoder_files.SUPERSEDED
facts, config_from_hf, config_to_hf = encoder.facts, encoder_files.config_from_hf, encoder_files.config_to_hf


_MASKED_LM = encoder_files.masked_lm(
    *("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    *("cls.predictions.decoder", "cls.predictions.bias"),
    read_as=("ForPreTraining",),  # it has both heads of pre-training: that of pairs is left out, unless it is asked for
)
HEADS: Mapping[str | None, Head[Config]] = {
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
    "token_classification": encoder_files.TOKEN_CLASSIFICATION,
    "question_answering": encoder_files.QUESTION_ANSWERING,
    "multiple_choice": encoder_files.multiple_choice(lambda c: c.class_dropout),
    "masked_lm": _MASKED_LM,
    "pretraining": encoder_files.pretraining(_MASKED_LM, "cls.seq_relationship", lambda c: 0.0),
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


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return encoder_files.hf_layout(
        config, head, HEADS, "bert", decoder="cls.predictions.decoder.weight", others=("cls.*",)
    )


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    return encoder_files.config_of_weights(weights, ("classifier.weight",), "cls.predictions.decoder.weight")
