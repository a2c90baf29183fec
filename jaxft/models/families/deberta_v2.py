"""DeBERTa-v2 and v3 (He et al. 2020, 2021), as `transformers` computes them (`DebertaV2Model` and its heads).

An encoder like BERT's whose attention looks at contents and at distances apart: each query meets vectors of distances (``c2p``), and
so does each key (``p2c``). There may be a convolution beside the first layer.

Dims: B batch, S length, D model width, N heads, H head size, P vectors of distances, K tokens of a convolution, G its groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.attention import MaskSpec
from jaxft.errors import UserError
from jaxft.layers import (
    ACTIVATIONS,
    Compute,
    Embed,
    LayerNorm,
    Linear,
    apply_stack,
    dropout,
    layer_norm,
    stacked_params,
    subkey,
)
from jaxft.models import encoder, encoder_files
from jaxft.models.checks import check_fields
from jaxft.models.contract import ONE_CHOICE, Head
from jaxft.models.disentangled import (
    C2P,
    P2C,
    Convolution,
    DisentangledAttention,
    DisentangledConfig,
    Distances,
    Kernel,
    convolved,
    disentangled_attentions,
)
from jaxft.models.heads import FirstTokenClasses, MaskedLm, Transform, dense_rules, norm_rules, normal
from jaxft.models.layout import Layout, Rule, Tensors, has_own

Array = jax.Array

MODEL_TYPES = {"deberta-v2": "DebertaV2"}


@dataclass(frozen=True)
class Config(DisentangledConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 128100
    hidden_size: int = 1536
    embedding_size: int | None = None
    """Width of the tables of tokens, positions and types; None: the model's."""
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    pooler: bool = False
    position_biased_input: bool = True
    """Whether vectors of positions are added to those of tokens."""
    conv_kernel_size: int = 0
    """Tokens that the convolution looks at; 0: there is none."""
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_dropout: float = 0.0
    """Dropout before the affine map that heads for rows begin with."""
    pooler_hidden_act: str = "gelu"
    """Behind that map."""
    cls_dropout: float | None = None
    """Dropout before the classes of a row, and before the score of a choice; None: ``hidden_dropout_prob``."""
    legacy: bool = True
    """The masked-LM head is BERT's; else it is the one that the published models were trained with."""

    FIXED: ClassVar[Mapping[str, Any]] = {"pooler": False, "classifier_dropout": None}
    MAY_BE_0: ClassVar[tuple[str, ...]] = ("type_vocab_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes, rates = ("embedding_size", "conv_groups"), ("pooler_dropout", "cls_dropout")
        check_fields(self, sizes, rates, ("conv_act", "pooler_hidden_act"))
        if self.conv_kernel_size < 0 or (self.conv_kernel_size and self.conv_kernel_size % 2 == 0):
            raise UserError(f"model.arch: conv_kernel_size={self.conv_kernel_size} must be an odd number, or 0")
        if self.conv_kernel_size and self.hidden_size % self.conv_groups:
            raise UserError(
                f"model.arch: hidden_size={self.hidden_size} is not a multiple of conv_groups={self.conv_groups}"
            )

    @property
    def embedding_width(self) -> int:
        """Width of the tables."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def row_dropout(self) -> float:
        """Before the classes of a row, and before the score of a choice."""
        return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout


TINY = Config(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=40, type_vocab_size=2, relative_attention=True, pos_att_type=("c2p", "p2c"),
    position_buckets=8, norm_rel_ebd="layer_norm", conv_kernel_size=3,
)  # fmt: skip


class Seen(NamedTuple):
    """What layers look at besides their input."""

    mask: MaskSpec
    table: Array | None
    """Vectors of distances [P, D]."""
    kernel: Kernel | None
    """The convolution."""

    def only_tokens(self, x: Array) -> Array:
        """``x`` [B, S, D], 0 for padding."""
        there = _there(self.mask)
        return x if there is None else jnp.where(there[..., None], x, 0)


def _there(mask: MaskSpec) -> Array | None:
    """[B, S], False where there is padding; None: there is none."""
    of_rows = mask.merged()
    return of_rows.padding if of_rows.segments is None else of_rows.segments != 0


class Layer(nn.Module):
    """One encoder layer: post-norm attention, then post-norm MLP, then the convolution of its input where there is one, normalised."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, key: Array | None, seen: Seen, convolves: bool) -> Array:
        c, how, kernel = self.config, self.compute, seen.kernel
        y = DisentangledAttention(c, how, name="attention")(x, seen.mask, seen.table, subkey(key, 0))
        y = encoder.Mlp(c, how, name="mlp")(y, subkey(key, 1))
        if convolves and kernel is not None:
            more = seen.only_tokens(convolved(x, kernel, seen.mask.segments, how))
            more = ACTIVATIONS[c.conv_act](dropout(more, c.hidden_dropout_prob, subkey(key, 2), how.dropout_bits))
            y = seen.only_tokens(layer_norm(y + more, kernel.scale, kernel.shift, c.layer_norm_eps))
        return how.rules.constrain(y, "batch", "length", "act_embed")


class Embeddings(nn.Module):
    """Sum of the vectors that there are of tokens, positions and types, mapped to the model's width, normalised; 0 for padding."""

    config: Config
    compute: Compute

    def setup(self) -> None:
        c, width = self.config, self.config.embedding_width

        def table(rows: int, axis: str) -> Embed:
            return Embed(rows, width, (axis, "embed"), self.compute, normal(c))

        self.token = table(c.vocab_size, "vocab")
        if c.position_biased_input:
            self.position = table(c.max_position_embeddings, "positions")
        if c.type_vocab_size:
            self.type = table(c.type_vocab_size, "types")
        if c.projects:
            names = ("embed", "pooled")
            self.project = Linear((width, c.hidden_size), names, self.compute, normal(c), biased=False)
        self.norm = LayerNorm(c.layer_norm_eps, self.compute)

    def __call__(
        self, tokens: Array, types: Array | None, positions: Array, there: Array | None, key: Array | None
    ) -> Array:
        c, x = self.config, self.token(tokens)
        if c.pad_token_id is not None:
            x = jnp.where((tokens == c.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        x = x + self.position(positions) if c.position_biased_input else x
        x = x + self.type(types) if types is not None else x
        x = self.norm(self.project(x) if c.projects else x)
        x = x if there is None else jnp.where(there[..., None], x, 0)
        x = self.compute.rules.constrain(x, "batch", "length", "act_embed")
        return dropout(x, c.hidden_dropout_prob, key, self.compute.dropout_bits)


class Model(encoder.EncoderModel):
    """The encoder, with a head as asked."""

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
        x = embeddings(tokens, types, places, _there(mask), subkey(key, 0))
        eps = c.layer_norm_eps if c.norm_rel_ebd == "layer_norm" else None
        table = Distances(c.ranges, c.hidden_size, eps, how, normal(c), name="distances")()
        kernel = None
        if c.conv_kernel_size:
            taps, groups, width = c.conv_kernel_size, c.conv_groups, c.hidden_size
            kernel = Convolution(taps, groups, width, how, normal(c), name="conv")()
        layer, kinds = Layer(c, how, parent=None), (kernel is not None, *(False,) * (count - 1))
        layers = stacked_params(self, "layers", layer, count, x[:1], None, Seen(MaskSpec(), table, None), False)
        seen = Seen(mask, table, kernel)
        hidden, states, _ = apply_stack(layer, layers, count, x, subkey(key, 1), seen, keep=keep, kinds=kinds)
        looked = disentangled_attentions(c, layers, states, mask, table, how) if attentions else None
        return encoder.Encoded(hidden, embeddings.token.embedding, states, looked)


facts = encoder.facts


# ------------------------------------------------------------------------------------------------ Hugging Face layout


def _of_rows(suffix: str, outputs: Any, marks: tuple[str, ...], **more: Any) -> Head:
    """A head on the first token of each row, with so many outputs by the Config."""
    return Head(
        suffix,
        lambda c, compute, name: FirstTokenClasses(
            c.hidden_size, outputs(c), c.row_dropout, compute, normal(c), c.pooler_hidden_act, c.pooler_dropout, name=name
        ),
        lambda c: (*dense_rules("head/dense", "pooler.dense"), *dense_rules("head/linear", "classifier")),
        marks, **more,
    )  # fmt: skip


_LEGACY = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
_TRAINED = ("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm")
_DECODER = "cls.predictions.decoder"
_BERTS = encoder_files.masked_lm(*_LEGACY, _DECODER, "cls.predictions.bias")


def _transform(c: Config) -> Transform:
    return Transform(c.hidden_size, c.hidden_act, c.layer_norm_eps, normal(c))


def _masked_lm(c: Config, compute: Compute, name: str) -> nn.Module:
    if c.legacy:
        assert _BERTS.make is not None
        return _BERTS.make(c, compute, name)
    if c.projects:
        raise UserError(f"legacy=false needs tables as wide as the model, not embedding_size={c.embedding_size}")
    return MaskedLm(_transform(c), c.vocab_size, True, compute, name=name)


def _masked_lm_rules(c: Config) -> tuple[Rule, ...]:
    own = (*_transform(c).rules(*_TRAINED), Rule("head/bias", "lm_predictions.lm_head.bias"))
    return _BERTS.rules(c) if c.legacy else own


HEADS: Mapping[str | None, Head] = {
    None: Head("Model"),
    # The classifier of single tokens has the same name, and nothing before it.
    "classification": _of_rows(
        "ForSequenceClassification",
        lambda c: c.num_labels,
        ("pooler.dense.weight", "classifier.weight"),
        classes="rows",
    ),
    "token_classification": encoder_files.TOKEN_CLASSIFICATION,
    "question_answering": encoder_files.QUESTION_ANSWERING,
    "multiple_choice": _of_rows("ForMultipleChoice", lambda c: ONE_CHOICE, ()),
    "masked_lm": Head("ForMaskedLM", _masked_lm, _masked_lm_rules, ("[cl]*predictions.[tl]*.dense.weight",)),
}
Model.HEADS = HEADS

_OWN = tuple(
    one.name
    for one in dataclasses.fields(Config)
    if one.name not in ("num_labels", "pos_att_type", "embedding_size", *Config.FIXED)
)
SUPERSEDED = ("attention_head_size", "position_embedding_type")


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: a size that no weights can have, or a kind of attention that the reference does not know.
    """
    found, width = {name: hf[name] for name in _OWN if name in hf}, hf.get("hidden_size", Config.hidden_size)
    heads = hf.get("num_attention_heads", Config.num_attention_heads)
    for name, wanted in (("pooler_hidden_size", width), ("attention_head_size", width // heads if heads else None)):
        if hf.get(name, wanted) != wanted:
            raise UserError(f"config.json: {name}={hf[name]} is not supported, only {wanted}")
    stated = hf.get("pos_att_type") or ()
    kinds = [one.strip() for one in stated.lower().split("|")] if isinstance(stated, str) else list(stated)
    if unknown := [one for one in kinds if one not in (C2P, P2C)]:
        raise UserError(f"config.json: pos_att_type {unknown[0]!r} is not supported, only {C2P} and {P2C}")
    if "norm_rel_ebd" in hf:
        parts = [one.strip() for one in str(hf["norm_rel_ebd"]).lower().split("|")]
        found["norm_rel_ebd"] = "layer_norm" if "layer_norm" in parts else "|".join(parts)
    if hf.get("embedding_size", width) != width:
        found["embedding_size"] = hf["embedding_size"]
    return {**found, "pos_att_type": kinds}


def config_to_hf(config: Config) -> dict[str, Any]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    sizes = {"embedding_size": config.embedding_width, "pooler_hidden_size": config.hidden_size}
    return {**{name: getattr(config, name) for name in _OWN}, **sizes, "pos_att_type": list(config.pos_att_type)}


def config_of_weights(weights: Tensors) -> dict[str, Any]:
    """What tensors alone say about the Config; believed over config.json."""
    said, names = {}, weights.names()
    if "classifier.weight" in names:
        said["num_labels"] = weights.shape("classifier.weight")[0]
    heads = [legacy for legacy, (dense, _) in ((True, _LEGACY), (False, _TRAINED)) if f"{dense}.weight" in names]
    if len(heads) == 1:
        said["legacy"] = heads[0]
    # transformers ties the two only where they are equal, whatever config.json says.
    if has_own(weights, f"{_DECODER}.weight", "embeddings.word_embeddings.weight"):
        said["tie_word_embeddings"] = False
    return said


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    c, embed, body = config, "deberta.embeddings", "deberta.encoder"
    at = "attention.self"
    layers = encoder_files.LayerNames(heads=(f"{at}.query_proj", f"{at}.key_proj", f"{at}.value_proj"))
    # A tied decoder may be the only one of the two that a file has.
    tied = (f"{_DECODER}.weight",) if head == "masked_lm" and c.legacy and c.tie_word_embeddings else ()
    own = [name for name in c.maps().values() if not c.share_att_key]
    rules = [Rule("embed/token/embedding", f"{embed}.word_embeddings.weight", spares=tied)]
    if c.position_biased_input:
        rules.append(Rule("embed/position/embedding", f"{embed}.position_embeddings.weight"))
    if c.type_vocab_size:
        rules.append(Rule("embed/type/embedding", f"{embed}.token_type_embeddings.weight"))
    if c.projects:
        rules += dense_rules("embed/project", f"{embed}.embed_proj", biased=False)
    rules += (*norm_rules("embed/norm", f"{embed}.LayerNorm"), *layers.rules("deberta"))
    for name in own:
        at = f"{body}.layer.{{layer}}.attention.self.{name}_proj"
        rules.append(Rule(f"layers/attention/{name}/kernel", f"{at}.weight", "(n h) d -> d n h"))
        rules.append(Rule(f"layers/attention/{name}/bias", f"{at}.bias", "(n h) -> n h"))
    if c.relative_attention:
        rules.append(Rule("distances/embedding", f"{body}.rel_embeddings.weight"))
    if c.norm_rel_ebd == "layer_norm":
        rules += norm_rules("distances/norm", f"{body}.LayerNorm")
    if c.conv_kernel_size:
        rules.append(Rule("conv/kernel", f"{body}.conv.conv.weight", "(g o) i k -> k g i o"))
        rules.append(Rule("conv/bias", f"{body}.conv.conv.bias"))
        rules.append(Rule("conv/scale", f"{body}.conv.LayerNorm.weight"))
        rules.append(Rule("conv/shift", f"{body}.conv.LayerNorm.bias"))
    # The published models have vectors of positions that they do not use, and the head of another task.
    unused = ("*embeddings.position_embeddings.weight", "mask_predictions.*")
    others = ("*embeddings.position_ids", "cls.*", "lm_predictions.*", "pooler.dense.*", "classifier.*", "qa_outputs.*")
    return Layout((*rules, *HEADS[head].rules(c)), "deberta.", encoder_files.RENAMED, (*unused, *others), ("head/*",))
