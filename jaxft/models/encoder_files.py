"""What the reference's files call the parts of an encoder (:mod:`jaxft.models.encoder`): config.json, weights, ready-made heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.models.contract import ONE_CHOICE, SPAN_ENDS, Head
from jaxft.models.encoder import EncoderConfig
from jaxft.models.heads import (
    MaskedLm,
    MaskedLmAndPairs,
    PooledClasses,
    TokenClasses,
    Transform,
    decoder_rules,
    dense_rules,
    norm_rules,
    normal,
)
from jaxft.models.layout import Layout, Rule, Tensors, has_own

C = TypeVar("C", bound=EncoderConfig)

SAME_NAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id"),
    *("tie_word_embeddings",),
)
"""Keys of config.json that are fields of :class:`EncoderConfig`."""
SUPERSEDED = ("is_decoder", "add_cross_attention", "position_embedding_type")
"""Keys of config.json that exports leave out: all that is supported is the reference's default, which some files call null."""
RENAMED = ((".gamma", ".weight"), (".beta", ".bias"))
"""LayerNorm in the original TensorFlow port, still on the hub."""


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`EncoderConfig` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: the file asks for something else than an encoder with absolute positions.
    """
    if hf.get("position_embedding_type") not in (None, "absolute"):
        raise UserError(
            f"config.json: position_embedding_type={hf['position_embedding_type']!r} is not supported (only 'absolute')"
        )
    for flag in ("is_decoder", "add_cross_attention"):
        if hf.get(flag):
            raise UserError(f"config.json: {flag}=true is not supported; this family here is an encoder")
    return {name: hf[name] for name in SAME_NAME if name in hf}


def config_to_hf(config: EncoderConfig) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return {name: getattr(config, name) for name in SAME_NAME}


@dataclass(frozen=True)
class LayerNames:
    """What the reference calls the parts of a layer."""

    layer: str = "encoder.layer.{layer}"
    """Name of one layer, behind the encoder's prefix."""
    heads: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    inner: int = 1
    """The same as in :class:`Rule`."""

    def rules(self, prefix: str) -> tuple[Rule, ...]:
        """The layers' rows of the weight table.

        Args:
          prefix: of the encoder in models with a head, for instance ``bert``.
        """
        at = f"{prefix}.{self.layer}"
        heads = zip(("query", "key", "value"), self.heads, strict=True)
        rules = (
            *(
                Rule(f"layers/attention/{ours}/{part}", f"{at}.{theirs}.{tensor}", pattern)
                for ours, theirs in heads
                for part, tensor, pattern in (
                    ("kernel", "weight", "(n h) d -> d n h"),
                    ("bias", "bias", "(n h) -> n h"),
                )
            ),
            Rule("layers/attention/out/kernel", f"{at}.{self.out}.weight", "d (n h) -> n h d"),
            Rule("layers/attention/out/bias", f"{at}.{self.out}.bias"),
            *norm_rules("layers/attention/norm", f"{at}.{self.attention_norm}"),
            *dense_rules("layers/mlp/up", f"{at}.{self.up}"),
            *dense_rules("layers/mlp/down", f"{at}.{self.down}"),
            *norm_rules("layers/mlp/norm", f"{at}.{self.mlp_norm}"),
        )
        return tuple(dataclasses.replace(rule, inner=self.inner) for rule in rules)


def embedding_rules(
    config: EncoderConfig, prefix: str, spares: tuple[str, ...] = (), project: str = "embeddings_project"
) -> tuple[Rule, ...]:
    """The embeddings' rows of the weight table.

    Args:
      prefix: of the encoder in models with a head, for instance ``bert``.
      spares: further names of the table of tokens.
      project: the map to the model's width, where there is one.
    """
    at = f"{prefix}.embeddings"
    types = (Rule("embed/type/embedding", f"{at}.token_type_embeddings.weight"),) if config.type_vocab_size else ()
    return (
        Rule("embed/token/embedding", f"{at}.word_embeddings.weight", spares=spares),
        Rule("embed/position/embedding", f"{at}.position_embeddings.weight"),
        *types,
        *norm_rules("embed/norm", f"{at}.LayerNorm"),
        *(dense_rules("embed/project", f"{prefix}.{project}") if config.projects else ()),
    )


TOKEN_CLASSIFICATION: Head[EncoderConfig] = Head(
    "ForTokenClassification",
    lambda c, compute, name: TokenClasses(c.hidden_size, c.num_labels, c.class_dropout, compute, normal(c), name=name),
    lambda c: dense_rules("head/linear", "classifier"),
    marks=("classifier.weight",),
    classes="tokens",
)

QUESTION_ANSWERING: Head[EncoderConfig] = Head(
    "ForQuestionAnswering",
    lambda c, compute, name: TokenClasses(c.hidden_size, SPAN_ENDS, 0.0, compute, normal(c), name=name),
    lambda c: dense_rules("head/linear", "qa_outputs"),
    marks=("qa_outputs.weight",),
)


def multiple_choice(rate: Callable[[EncoderConfig], float]) -> Head[EncoderConfig]:
    """The head that says how well each row answers its question, from the pooled vector; its tensors are those of a classifier.

    Args:
      rate: of dropout, by the Config.
    """
    return Head(
        "ForMultipleChoice",
        lambda c, compute, name: PooledClasses(c.hidden_size, ONE_CHOICE, rate(c), compute, normal(c), name=name),
        lambda c: dense_rules("head/linear", "classifier"),
        pooled=True,
    )


def masked_lm(
    dense: str, norm: str, decoder: str, bias: str | None, act: str | None = None, read_as: tuple[str, ...] = ()
) -> Head[EncoderConfig]:
    """The masked-LM head, by the names of its tensors.

    Args:
      dense: of the affine map.
      norm: of the norm behind it.
      decoder: of the vocabulary matrix and its bias.
      bias: the other name of that bias; None: it has no other.
      act: activation between affine map and norm; None: the one of the Config.
      read_as: field of the Head.
    """

    def make(c: EncoderConfig, compute: Compute, name: str) -> MaskedLm:
        return MaskedLm(_transform(c, act), c.vocab_size, c.tie_word_embeddings, compute, name=name)

    def rules(c: EncoderConfig) -> tuple[Rule, ...]:
        tied = decoder_rules(decoder, bias, tied=c.tie_word_embeddings)
        return (*_transform(c, act).rules(dense, norm), *tied)

    return Head("ForMaskedLM", make, rules, marks=(f"{dense}.weight",), read_as=read_as)


def pretraining(words: Head[EncoderConfig], rows: str, rate: Callable[[EncoderConfig], float]) -> Head[EncoderConfig]:
    """The masked-LM head, and beside it one that says whether the two texts of a row stand as they did in a document.

    Args:
      words: the masked-LM head.
      rows: name of the affine map of the pooled vector.
      rate: of dropout before it, by the Config.
    """

    def make(c: EncoderConfig, compute: Compute, name: str) -> MaskedLmAndPairs:
        tied = c.tie_word_embeddings
        return MaskedLmAndPairs(_transform(c), c.vocab_size, tied, compute, rate=rate(c), name=name)

    def rules(c: EncoderConfig) -> tuple[Rule, ...]:
        return (*words.rules(c), *dense_rules("head/linear", rows))

    return Head("ForPreTraining", make, rules, marks=(*words.marks, f"{rows}.weight"), pooled=True)


def _transform(c: EncoderConfig, act: str | None = None) -> Transform:
    """What masked-LM heads begin with; its activation is that of the Config, if no other is named."""
    return Transform(c.hidden_size, act or c.hidden_act, c.layer_norm_eps, normal(c), outputs=c.embedding_width)


def hf_layout(
    config: C,
    head: str | None,
    heads: Mapping[str | None, Head[C]],
    prefix: str,
    *,
    decoder: str,
    others: tuple[str, ...],
    layers: LayerNames = LayerNames(),
    project: str = "embeddings_project",
    pooler: str = "pooler.dense",
    more: tuple[Rule, ...] = (),
) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over.

    Args:
      prefix: of the encoder in models with a head, for instance ``bert``.
      decoder: the masked-LM head's matrix over the vocabulary.
      others: patterns of tensors of heads that the task does not use.
      layers: names of the parts of a layer.
      project: the map of embeddings to the model's width, where there is one.
      pooler: the pooler's affine map.
      more: rows of what the encoder has besides.
    """
    # A tied decoder may be the only one of the two that a file has.
    tied = (decoder,) if head in _OF_WORDS and config.tie_word_embeddings else ()
    pooled = config.pools(heads[head])
    rules = (
        *(*embedding_rules(config, prefix, tied, project), *layers.rules(prefix), *more),
        *(dense_rules("pooler", f"{prefix}.{pooler}") if pooled else ()),
        *heads[head].rules(config),
    )
    return Layout(rules, f"{prefix}.", RENAMED, (*_LEFTOVERS, f"*{pooler}.*", *others), _FRESH)


_OF_WORDS = ("masked_lm", "pretraining")
"""Heads with a vocabulary."""
# What a task may need that a checkpoint need not have; initialised afresh, and said.
_FRESH = ("head/*", "pooler/*")
# Known, harmless leftovers: buffers, and heads that the task does not use.
_LEFTOVERS = (
    *("*embeddings.position_ids", "*embeddings.token_type_ids"),
    *("classifier.*", "qa_outputs.*"),
)


def config_of_weights(
    weights: Tensors, classifiers: tuple[str, ...], decoder: str, pooler: str | None = "pooler.dense"
) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json.

    Args:
      classifiers: names that the matrix of classes may have.
      decoder: the masked-LM head's matrix over the vocabulary.
      pooler: the pooler's affine map; None: the family has none.
    """
    names = weights.names()
    said: dict[str, object] = (
        {} if pooler is None else {"pooler": any(name.endswith(f"{pooler}.weight") for name in names)}
    )
    for name in classifiers:
        if name in names:
            said["num_labels"] = weights.shape(name)[0]
    # transformers ties the two only where they are equal, whatever config.json says.
    if has_own(weights, decoder, "embeddings.word_embeddings.weight"):
        said["tie_word_embeddings"] = False
    return said
