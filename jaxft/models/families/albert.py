"""ALBERT (Lan et al. 2020), as `transformers` computes it (`AlbertModel` and its heads).

An encoder like BERT's whose layers share parameters, and whose tables may be narrower than its layers. What an MLP adds has no dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.errors import UserError
from jaxft.models import encoder, encoder_files
from jaxft.models.contract import Head
from jaxft.models.heads import PooledClasses, dense_rules, normal
from jaxft.models.layout import Layout, Tensors

MODEL_TYPES = {"albert": "Albert"}


@dataclass(frozen=True)
class Config(encoder.EncoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field; there,
    ``classifier_dropout`` is ``classifier_dropout_prob``."""

    vocab_size: int = 30000
    embedding_size: int = 128
    """Width of the tables of tokens, positions and types."""
    hidden_size: int = 4096
    num_hidden_groups: int = 1
    """Groups of layers: parameters differ between them alone. The first layers are of the first group, and so on."""
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    """Layers of a group, each with parameters of its own: all of them run at each of the ``num_hidden_layers`` places."""
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embedding_size", "num_hidden_groups", "inner_group_num"):
            if getattr(self, name) < 1:
                raise UserError(f"model.arch: {name}={getattr(self, name)} must be at least 1")
        if self.num_hidden_groups > self.num_hidden_layers:
            raise UserError(
                f"model.arch: num_hidden_groups={self.num_hidden_groups} is more than num_hidden_layers="
                f"{self.num_hidden_layers}: some groups would never run"
            )
        if self.classifier_dropout is None:
            raise UserError("model.arch: classifier_dropout must be a number in this family, 0.0 for none")

    @property
    def stacked_layers(self) -> int:
        """Layers that have parameters of their own: those of the first group, then those of the second, ..."""
        return self.num_hidden_groups * self.inner_group_num

    @property
    def order(self) -> tuple[int, ...]:
        """Which of them runs at each place."""
        per_group = self.num_hidden_layers / self.num_hidden_groups
        groups = [int(place / per_group) for place in range(self.num_hidden_layers)]  # rounded as the reference does
        return tuple(group * self.inner_group_num + i for group in groups for i in range(self.inner_group_num))

    @property
    def embedding_width(self) -> int:
        """Width of the tables."""
        return self.embedding_size

    @property
    def projects(self) -> bool:
        """The map behind the tables is always there."""
        return True

    @property
    def mlp_out_dropout(self) -> float:
        """There is none."""
        return 0.0


TINY = Config(
    vocab_size=96,
    embedding_size=24,
    hidden_size=32,
    num_hidden_layers=2,
    inner_group_num=2,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    max_position_embeddings=40,
)

facts = encoder.facts
_OWN = {
    **{name: name for name in ("embedding_size", "num_hidden_groups", "inner_group_num")},
    "classifier_dropout": "classifier_dropout_prob",
}
SUPERSEDED = (*encoder_files.SUPERSEDED, "classifier_dropout")


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: the file asks for something else than an encoder with absolute positions.
    """
    found = encoder_files.config_from_hf({name: value for name, value in hf.items() if name != "classifier_dropout"})
    return {**found, **{ours: hf[theirs] for ours, theirs in _OWN.items() if theirs in hf}}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    same = encoder_files.config_to_hf(config)
    del same["classifier_dropout"]
    return {**same, **{theirs: getattr(config, ours) for ours, theirs in _OWN.items()}}


_MASKED_LM = encoder_files.masked_lm(
    *("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"),
    read_as=("ForPreTraining",),  # it has both heads of pre-training: that of pairs is left out, unless it is asked for
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
        marks=("classifier.weight", "*pooler.weight"),
        classes="rows",
        pooled=True,
    ),
    "token_classification": encoder_files.TOKEN_CLASSIFICATION,
    "question_answering": encoder_files.QUESTION_ANSWERING,
    "multiple_choice": encoder_files.multiple_choice(lambda c: c.class_dropout),
    "masked_lm": _MASKED_LM,
    "pretraining": encoder_files.pretraining(_MASKED_LM, "sop_classifier.classifier", lambda c: c.class_dropout),
    # The reference has no class for it alone.
    "sentence_order": Head(
        "ForPreTraining",
        lambda c, compute, name: PooledClasses(c.hidden_size, 2, c.class_dropout, compute, normal(c), name=name),
        lambda c: dense_rules("head/linear", "sop_classifier.classifier"),
        marks=("sop_classifier.classifier.weight",),
        pooled=True,
    ),
}


class Model(encoder.EncoderModel):
    """The encoder, with a pooler and head as asked."""

    HEADS = HEADS


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    layers = encoder_files.LayerNames(
        layer="encoder.albert_layer_groups.{layer}.albert_layers.{inner}",
        heads=("attention.query", "attention.key", "attention.value"),
        out="attention.dense",
        attention_norm="attention.LayerNorm",
        up="ffn",
        down="ffn_output",
        mlp_norm="full_layer_layer_norm",
        inner=config.inner_group_num,
    )
    names = {"project": "encoder.embedding_hidden_mapping_in", "pooler": "pooler"}
    others = ("predictions.*", "sop_classifier.*")
    return encoder_files.hf_layout(
        config, head, HEADS, "albert", decoder="predictions.decoder.weight", others=others, layers=layers, **names
    )


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    return encoder_files.config_of_weights(weights, ("classifier.weight",), "predictions.decoder.weight", "pooler")
