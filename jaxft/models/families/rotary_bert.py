"""NomicBERT (Nussbaum et al. 2024), GTE (Zhang et al. 2024) and EuroBERT (Boizard et al. 2025), as `transformers` computes them.

Encoders with rotary positions and gated MLPs. NomicBERT and GTE are normalised behind each part of a layer, like BERT; EuroBERT before
it, by root mean squares, and may have fewer heads of keys than of queries.

Dims: B batch, S length, D model width, N heads, K key heads, H head size, F MLP width, V vocabulary, L layers, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.attention import MaskSpec
from jaxft.attention.probabilities import attention_probabilities
from jaxft.errors import UserError
from jaxft.layers import (
    Compute,
    Embed,
    LayerNorm,
    RMSNorm,
    Rotary,
    apply_stack,
    dropout,
    project_exactly,
    rms_norm,
    rotate,
    stacked_params,
    subkey,
)
from jaxft.models import encoder, encoder_files, spellings
from jaxft.models.block_files import LLAMAS, BlockNames
from jaxft.models.blocks import GatedMlp, RotaryAttention
from jaxft.models.checks import check_fields
from jaxft.models.contract import Head
from jaxft.models.heads import DenseClasses, PooledClasses, Vocabulary, dense_rules, norm_rules, normal
from jaxft.models.layout import Layout, Rule, Tensors, has_own
from jaxft.models.rotary_files import SUPERSEDED_KEYS, rotary_from_hf, rotary_to_hf

Array = jax.Array

NOMIC, GTE, EURO = "nomic_bert", "gte", "eurobert"
MODEL_TYPES = {NOMIC: "NomicBert", GTE: "Gte", EURO: "EuroBert"}
_THETAS = {NOMIC: 1_000.0, GTE: 160_000.0, EURO: 10_000.0}
_USUAL: Mapping[str, Mapping[str, object]] = {
    NOMIC: {},
    GTE: {
        "vocab_size": 250048, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "max_position_embeddings": 8192,
        "type_vocab_size": 1, "pad_token_id": 1,
    },
    EURO: {
        "vocab_size": 128256, "max_position_embeddings": 8192, "type_vocab_size": 0, "layer_norm_eps": 1e-5,
        "pad_token_id": 128001, "tie_word_embeddings": False, "classifier_pooling": "late",
    },
}  # fmt: skip
"""The reference's defaults that are not those of Config."""
_EUROS = {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False, "classifier_pooling": None}
_BERTS = {"hidden_dropout_prob": 0.0, "classifier_dropout": None, "type_vocab_size": 0}
_NO_CHOICE: Mapping[str, Mapping[str, object]] = {NOMIC: _EUROS, GTE: _EUROS, EURO: _BERTS}
"""Fields of Config that other models of the family have, and what they are without."""


@dataclass(frozen=True)
class Config(encoder.EncoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field; defaults are those of
    NomicBERT."""

    model_type: Literal["nomic_bert", "gte", "eurobert"] = NOMIC
    vocab_size: int = 30528
    num_key_value_heads: int | None = None
    """EuroBERT's; None: as many as query heads."""
    head_dim: int | None = None
    """None: ``hidden_size / num_attention_heads``."""
    hidden_act: str = "silu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    """EuroBERT's files call it ``attention_dropout``."""
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-12
    """EuroBERT's files call it ``rms_norm_eps``."""
    rope: Rotary = field(default_factory=lambda: Rotary(_THETAS[NOMIC]))
    attention_bias: bool = False
    """EuroBERT's choice; NomicBERT has no biases there, GTE all of them."""
    mlp_bias: bool = False
    """EuroBERT's choice, the vocabulary's matrix included; NomicBERT has no biases there, GTE one behind the second map."""
    classifier_pooling: Literal["bos", "mean", "late"] | None = None
    """Which vector of a text EuroBERT classifies: its first one, their mean, or the mean behind an affine map and GELU (``late``).
    None: it is the pooler's, of the first one."""
    pooler: bool = False

    FIXED: ClassVar[Mapping[str, object]] = {"pooler": False}
    MAY_BE_0: ClassVar[tuple[str, ...]] = ("type_vocab_size",)

    def __post_init__(self) -> None:
        kind = self.model_type
        for name, value in _NO_CHOICE[kind].items():
            if getattr(self, name) != value:
                raise UserError(f"model.arch: {name}={getattr(self, name)!r} is not supported: it is {value} in {kind}")
        super().__post_init__()
        check_fields(self, ("num_key_value_heads", "head_dim", *(("type_vocab_size",) if kind == NOMIC else ())))
        if kind == EURO and self.classifier_pooling is None:
            raise UserError("model.arch: classifier_pooling must be 'bos', 'mean' or 'late' in eurobert")
        if kind == NOMIC and self.pad_token_id is None:
            raise UserError("model.arch: pad_token_id must be a number in nomic_bert")
        if self.num_attention_heads % self.key_heads:
            raise UserError(
                f"model.arch: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.key_heads}"
            )
        if self.head_size % 2:
            raise UserError(f"model.arch: the head size {self.head_size} must be even for rotary positions")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def biased(self) -> bool:
        """Whether the maps of attention have biases."""
        return self.attention_bias or self.model_type == GTE

    @property
    def down_biased(self) -> bool:
        """Whether the second map of an MLP has a bias."""
        return self.mlp_bias or self.model_type == GTE

    def pools(self, head: Head) -> bool:
        """Whether a model with that head has a pooler."""
        return super().pools(head) and self.model_type != EURO


TINY = Config(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=64, initializer_range=0.1, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)  # fmt: skip


def _norm(c: Config, compute: Compute, name: str) -> nn.Module:
    eps = c.layer_norm_eps
    return RMSNorm(eps, compute, name=name) if c.model_type == EURO else LayerNorm(eps, compute, name=name)


class Layer(nn.Module):
    """One encoder layer: attention, then MLP; each normalised behind the sum with its input, EuroBERT's input before it."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, key: Array | None, mask: MaskSpec, positions: Array) -> Array:
        c, how, start = self.config, self.compute, normal(self.config)
        drop, first = functools.partial(dropout, bits=how.dropout_bits), c.model_type == EURO
        sizes, rate = (c.num_attention_heads, c.key_heads, c.head_size), c.attention_probs_dropout_prob
        together = c.key_heads == c.num_attention_heads
        attention = RotaryAttention(
            *sizes, how, start, start, rate, c.biased, together=together, name="attention"
        )  # fmt: skip
        inner = c.hidden_dropout_prob if c.model_type == GTE else 0.0
        widths = (c.intermediate_size, c.hidden_act)
        mlp = GatedMlp(*widths, how, start, start, c.mlp_bias, inner, c.down_biased, name="mlp")
        norm, mlp_norm = (_norm(c, how, name) for name in ("norm", "mlp_norm"))

        mixed, _ = attention(norm(x) if first else x, mask, positions, subkey(key, 0), c.rope)
        x = x + drop(mixed, c.hidden_dropout_prob, subkey(key, 1))
        x = x if first else norm(x)
        x = x + drop(mlp(mlp_norm(x) if first else x, subkey(key, 2)), c.hidden_dropout_prob, subkey(key, 3))
        return how.rules.constrain(x if first else mlp_norm(x), "batch", "length", "act_embed")


class Embeddings(nn.Module):
    """Vectors of tokens; NomicBERT's and GTE's with those of types, normalised."""

    config: Config
    compute: Compute

    def setup(self) -> None:
        c = self.config
        self.token = Embed(c.vocab_size, c.hidden_size, ("vocab", "embed"), self.compute, normal(c))
        if c.type_vocab_size:
            self.type = Embed(c.type_vocab_size, c.hidden_size, ("types", "embed"), self.compute, normal(c))
        if c.model_type != EURO:
            self.norm = LayerNorm(c.layer_norm_eps, self.compute)

    def __call__(self, tokens: Array, types: Array | None, key: Array | None) -> Array:
        c, x = self.config, self.token(tokens)
        if c.pad_token_id is not None:
            x = jnp.where((tokens == c.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        x = x + self.type(types) if types is not None else x
        x = x if c.model_type == EURO else self.norm(x)
        x = self.compute.rules.constrain(x, "batch", "length", "act_embed")
        return dropout(x, c.hidden_dropout_prob, key, self.compute.dropout_bits)


def _classification(c: Config, compute: Compute, name: str) -> nn.Module:
    if c.model_type == EURO:
        how: Any = {"bos": "cls"}.get(str(c.classifier_pooling), c.classifier_pooling)
        return DenseClasses(c.hidden_size, c.num_labels, how, compute, normal(c), name=name)
    return PooledClasses(c.hidden_size, c.num_labels, c.class_dropout, compute, normal(c), name=name)


def _classification_rules(c: Config) -> tuple[Rule, ...]:
    dense = dense_rules("head/dense", "dense") if c.model_type == EURO else ()
    return (*dense, *dense_rules("head/linear", "classifier"))


_MASKED_LM: Mapping[str, Head] = {
    NOMIC: encoder_files.masked_lm(
        *("cls.predictions.transform.dense", "cls.predictions.transform.layer_norm"),
        *("cls.predictions.decoder", "cls.predictions.bias"),
    ),
    GTE: encoder_files.masked_lm("lm_head.dense", "lm_head.norm", "lm_head.decoder", None, "gelu"),
    EURO: Head(
        "ForMaskedLM",
        lambda c, compute, name: Vocabulary(
            c.hidden_size, c.vocab_size, c.tie_word_embeddings, compute, normal(c), c.mlp_bias, "predicted", name=name
        ),
        lambda c: (
            *(() if c.tie_word_embeddings else (Rule("head/kernel", "lm_head.weight", "v d -> d v"),)),
            *((Rule("head/bias", "lm_head.bias"),) if c.mlp_bias else ()),
        ),
    ),
}


def _masked_lm(c: Config, compute: Compute, name: str) -> nn.Module:
    make = _MASKED_LM[c.model_type].make
    assert make is not None
    return make(c, compute, name)


HEADS: Mapping[str | None, Head] = {
    None: Head("Model"),
    # The classifier of single tokens has the same name, and no affine map before it.
    "classification": Head(
        "ForSequenceClassification",
        _classification,
        _classification_rules,
        ("classifier.weight", "*dense.weight"),
        "rows",
        pooled=True,
    ),
    "token_classification": encoder_files.TOKEN_CLASSIFICATION,
    "masked_lm": Head(
        "ForMaskedLM",
        _masked_lm,
        lambda c: _MASKED_LM[c.model_type].rules(c),
        ("[cl][lm][s_]*.weight",),  # cls.predictions.* or lm_head.*
        read_as=("ForPreTraining",),  # NomicBERT's, before transformers had it
    ),
}


class Model(encoder.EncoderModel):
    """The encoder, with a pooler and head as asked."""

    HEADS = HEADS

    def encoded(
        self,
        tokens: Array,
        types: Array | None,
        places: Array,
        mask: MaskSpec,
        key: Array | None,
        keep: bool,
        attentions: bool,
    ) -> encoder.Encoded:
        """Embeddings and layers."""
        c, how, count = cast(Config, self.config), self.compute, self.config.num_hidden_layers
        embeddings = Embeddings(c, how, name="embed")
        x = embeddings(tokens, types, subkey(key, 0))
        layer = Layer(c, how, parent=None)
        layers = stacked_params(self, "layers", layer, count, x[:1], None, MaskSpec(), places[:1])
        x, states, _ = apply_stack(layer, layers, count, x, subkey(key, 1), mask, places, keep=keep)
        looked = None
        if attentions and states is not None:
            each = (_attention(c, layers, states[i], i, mask, places) for i in range(count))
            looked = jnp.stack([*each])
        if c.model_type == EURO:
            x = _norm(c, how, "norm")(x)
            # The last one normalised, as the reference has it.
            states = states.at[-1].set(x) if states is not None else None
        return encoder.Encoded(x, embeddings.token.embedding, states, looked)


def _attention(c: Config, layers: Any, x: Array, number: int, mask: MaskSpec, positions: Array) -> Array:
    """How much each token looks at each other one in a layer, [B, N, S, S] float32, from what went into it."""
    x = x.astype(jnp.float32)
    if c.model_type == EURO:
        x = rms_norm(x, layers["norm"]["scale"][number], c.layer_norm_eps)
    maps = (layers["attention"][name] for name in ("query", "key"))
    q, k = (rotate(project_exactly(x, one, number), positions, c.rope) for one in maps)
    return attention_probabilities(q, k, mask)


facts = encoder.facts


# ------------------------------------------------------------------------------------------------ Hugging Face layout

_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "pad_token_id", "tie_word_embeddings"),
)
_OF_BERTS = {name: name for name in (*_SAME, *_BERTS, "attention_probs_dropout_prob", "layer_norm_eps")}
_OF_EUROS = {"attention_probs_dropout_prob": "attention_dropout", "layer_norm_eps": "rms_norm_eps"}
_NAMES = {NOMIC: _OF_BERTS, GTE: _OF_BERTS, EURO: {name: name for name in (*_SAME, *_EUROS)} | _OF_EUROS}
"""Our fields, and the reference's keys."""
SUPERSEDED = (*SUPERSEDED_KEYS, *spellings.ALL_KEYS)


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5, or from before) states; absent ones are the reference's
    defaults for the file's ``model_type``, or NomicBERT's.

    Raises:
      UserError: the file asks for what the reference does not have, or has two values of one setting.
    """
    kind, hf = next((one for one in MODEL_TYPES if one == hf.get("model_type")), NOMIC), spellings.with_known_keys(hf)
    stated = {ours: hf[theirs] for ours, theirs in _NAMES[kind].items() if theirs in hf}
    found: dict[str, Any] = {"model_type": kind, **_USUAL[kind], **stated}
    heads, width = (found.get(name, getattr(Config, name)) for name in ("num_attention_heads", "hidden_size"))
    usual = {"num_key_value_heads": heads, "head_dim": width // heads if heads and isinstance(width, int) else None}
    found = {name: value for name, value in found.items() if name not in usual or value != usual[name]}
    limit = found.get("max_position_embeddings", Config.max_position_embeddings)
    return {**found, "rope": rotary_from_hf(hf, limit, _THETAS[kind])}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    found = {theirs: getattr(config, ours) for ours, theirs in _NAMES[config.model_type].items()}
    sizes = {"num_key_value_heads": config.key_heads} if config.model_type == EURO else {}
    return {**found, **sizes, "head_dim": config.head_size, "rope_parameters": rotary_to_hf(config.rope)}


_BLOCKS = {
    NOMIC: BlockNames(
        "nomic_bert.encoder.layers.{layer}", ("attn.Wqkv",), "attn.out_proj", ("mlp.fc12", "mlp.fc11"), "mlp.fc2",
        heads_apart=tuple(f"attn.{name}_proj" for name in "qkv"),
    ),
    GTE: BlockNames(
        "gte.encoder.layer.{layer}", ("attention.qkv_proj",), "attention.o_proj", ("mlp.up_gate_proj",), "mlp.down_proj",
        ("up", "gate"), tuple(f"attention.{name}_proj" for name in "qkv"), ("mlp.up_proj", "mlp.gate_proj"),
    ),
    EURO: LLAMAS,
}  # fmt: skip
_NORMS = {NOMIC: ("norm1", "norm2"), GTE: ("attn_ln", "mlp_ln"), EURO: ("input_layernorm", "post_attention_layernorm")}
_EMBED_NORMS = {NOMIC: "emb_ln", GTE: "embeddings.LayerNorm"}
_TABLES = {EURO: "embed_tokens.weight", **dict.fromkeys((NOMIC, GTE), "embeddings.word_embeddings.weight")}
_DECODERS = {NOMIC: "cls.predictions.decoder.weight", GTE: "lm_head.decoder.weight", EURO: "lm_head.weight"}


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    said: dict[str, object] = {}
    if "classifier.weight" in weights.names():
        said["num_labels"] = weights.shape("classifier.weight")[0]
    # transformers ties the two only where they are equal, whatever config.json says.
    if any(has_own(weights, _DECODERS[kind], _TABLES[kind]) for kind in MODEL_TYPES):
        said["tie_word_embeddings"] = False
    return said


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    c, kind = config, config.model_type
    block, biased, prefix = _BLOCKS[kind], kind != EURO, {NOMIC: "nomic_bert.", GTE: "gte.", EURO: "model."}[kind]
    # A tied decoder may be the only one of the two that a file has.
    tied = (_DECODERS[kind],) if head == "masked_lm" and c.tie_word_embeddings else ()
    types = (Rule("embed/type/embedding", f"{prefix}embeddings.token_type_embeddings.weight"),)
    norms = zip(("layers/norm", "layers/mlp_norm"), _NORMS[kind], strict=True)
    rules = (
        Rule("embed/token/embedding", f"{prefix}{_TABLES[kind]}", spares=tied),
        *(types if c.type_vocab_size else ()),
        *(
            norm_rules("norm", "model.norm", biased)
            if kind == EURO
            else norm_rules("embed/norm", prefix + _EMBED_NORMS[kind])
        ),
        *block.rules(c.biased, c.mlp_bias, c.down_biased),
        *(rule for ours, theirs in norms for rule in norm_rules(ours, f"{block.layer}.{theirs}", biased)),
        *(dense_rules("pooler", f"{prefix}pooler.dense") if c.pools(HEADS[head]) else ()),
        *HEADS[head].rules(c),
    )
    leftovers = ("*inv_freq", "*embeddings.position_ids", "*embeddings.token_type_ids", "*pooler.dense.*")
    others = ("cls.*", "lm_head.*", "classifier.*", "dense.*")
    respelt = {NOMIC: spellings.NOMIC, GTE: spellings.GTE}.get(kind, ())
    return Layout(rules, prefix, (), (*leftovers, *others), ("head/*", "pooler/*"), respelt)
