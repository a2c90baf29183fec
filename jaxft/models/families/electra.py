"""ELECTRA (Clark et al. 2020), as `transformers` computes it (`ElectraModel` and its heads).

An encoder like BERT's, without pooler, whose tables may be narrower than its layers. Generators have the masked-LM head,
discriminators the one that finds replaced tokens; both are trained together as one model with the head ``replaced_token_detection``.
"""

from __future__ import annotations

import dataclasses
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
from jaxft.models.replaced import GENERATOR, Pair, parts

__all__ = [
    "HEADS",
    "MODEL_TYPES",
    "PAIR",
    "SUPERSEDED",
    "TINY",
    "Config",
    "Model",
    "config_from_hf",
    "config_of_weights",
]
__all__ += ["config_to_hf", "facts", "generator_config", "hf_layout", "parts"]
MODEL_TYPES = {"electra": "Electra"}
PAIR = "replaced_token_detection"
"""The head of a model that is both networks."""
_OF_DISCRIMINATOR = "discriminator_predictions.dense.weight"


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
    generator_fraction: float = 0.25
    """With the head ``replaced_token_detection``: the generator's heads, each as wide as the discriminator's, and the width of its MLP,
    as a share of the discriminator's."""

    FIXED: ClassVar[Mapping[str, object]] = {"pooler": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_size < 1:
            raise UserError(f"model.arch: embedding_size={self.embedding_size} must be at least 1")
        check_rate("summary_last_dropout", self.summary_last_dropout)
        if not 0 < self.generator_fraction <= 1:
            raise UserError(f"model.arch.generator_fraction={self.generator_fraction} must be above 0, 1 at most")
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
    generator_fraction=0.5,
)

SUPERSEDED = encoder_files.SUPERSEDED
facts = encoder.facts
_OWN = ("embedding_size", "summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")
_PAIR = "generator_fraction"  # not a key of the reference's: written where it is not the default


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: the file asks for something else than an encoder with absolute positions, or for another kind of summary.
    """
    for name in ("summary_proj_to_labels", "summary_first_dropout"):
        if hf.get(name):
            raise UserError(f"config.json: {name}={hf[name]!r} is not supported")
    own = {name: hf[name] for name in (*_OWN, _PAIR) if name in hf}
    if own.get("summary_activation", "") is None:  # files of v4
        own["summary_activation"] = ""
    return {**encoder_files.config_from_hf(hf), **own}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    pair = {} if config.generator_fraction == Config.generator_fraction else {_PAIR: config.generator_fraction}
    return {**encoder_files.config_to_hf(config), **{name: getattr(config, name) for name in _OWN}, **pair}


def generator_config(config: Config) -> Config:
    """The Config of the generator that a discriminator is trained with."""
    heads = max(1, round(config.num_attention_heads * config.generator_fraction))
    inner = max(1, round(config.intermediate_size * config.generator_fraction))
    width = heads * config.head_size
    return dataclasses.replace(config, num_attention_heads=heads, hidden_size=width, intermediate_size=inner)


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


def _replaced_tokens_rules(config: Config) -> tuple[Rule, ...]:
    del config
    return (
        *dense_rules("head/dense", "discriminator_predictions.dense"),
        *dense_rules("head/linear", "discriminator_predictions.dense_prediction"),
    )


def _pair_rules(config: Config) -> tuple[Rule, ...]:
    """The rules of the discriminator's head, and of all that the generator has of its own."""
    small = generator_config(config)
    project = dense_rules("embed/project", "embeddings_project") if small.projects else ()
    rules = (*project, *encoder_files.LayerNames().rules(GENERATOR), *_MASKED_LM.rules(small))

    def own(rule: Rule) -> Rule:
        assert isinstance(rule.ours, str)
        theirs = rule.theirs.removeprefix(f"{GENERATOR}.")
        return dataclasses.replace(rule, ours=f"{GENERATOR}/{rule.ours}", theirs=f"{GENERATOR}.{theirs}")

    return (*_replaced_tokens_rules(config), *map(own, rules))


_MASKED_LM = encoder_files.masked_lm(
    "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head", None, "gelu"
)

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
    "masked_lm": _MASKED_LM,
    # Before the discriminator's alone, whose tensors it has too.
    PAIR: Head(
        "ForPreTraining",
        lambda c, compute, name: ReplacedTokens(c, compute, name=name),
        _pair_rules,
        marks=(_OF_DISCRIMINATOR, f"{GENERATOR}.generator_predictions.dense.weight"),
    ),
    "replaced_tokens": Head(
        "ForPreTraining",
        lambda c, compute, name: ReplacedTokens(c, compute, name=name),
        _replaced_tokens_rules,
        marks=(_OF_DISCRIMINATOR,),
    ),
}


class Encoder(encoder.EncoderModel):
    """The encoder, with a head as asked, of one network."""

    HEADS = HEADS


def _discriminator(config: Config, compute: Compute) -> Encoder:
    return Encoder(config, "replaced_tokens", compute)


def _generator(config: Config, compute: Compute) -> Encoder:
    return Encoder(generator_config(config), "masked_lm", compute)


_USUAL = Compute()


def Model(config: Config, head: str | None = None, compute: Compute = _USUAL) -> Encoder | Pair[Config]:
    """The encoder, with a head as asked; for the head ``replaced_token_detection``, discriminator and generator."""
    if head == PAIR:
        return Pair(config, head, compute, _discriminator, _generator)
    return Encoder(config, head, compute)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    others = ("generator_predictions.*", "generator_lm_head.*", "discriminator_predictions.*", "sequence_summary.*")
    others, decoder = (*others, f"{GENERATOR}.*"), "generator_lm_head.weight"
    layout = encoder_files.hf_layout(config, head, HEADS, "electra", decoder=decoder, others=others)
    # Discriminators that others have published lack it.
    return dataclasses.replace(layout, fresh=(*layout.fresh, f"{GENERATOR}/*"))


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    classes = ("classifier.out_proj.weight", "classifier.weight")
    return encoder_files.config_of_weights(weights, classes, "generator_lm_head.weight", pooler=None)
