"""BERT (Devlin et al. 2018), as `transformers` computes it (`BertModel` and its heads).

Dims: B batch, S length, D model width, N heads, H head size, F MLP width, V vocabulary, L layers, C classes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.attention import MaskSpec, attend, tokens_last
from jaxft.errors import UserError, nearest
from jaxft.hf import Layout, Rule
from jaxft.layers import (
    ACTIVATIONS,
    Compute,
    Embed,
    FromHeads,
    LayerNorm,
    Linear,
    Projection,
    TokenScore,
    apply_stack,
    checked_call,
    declare,
    dropout,
    project_together,
    score_tokens,
    stacked_params,
    subkey,
    usual_promotion,
    vocabulary_logits,
)
from jaxft.weights import Weights
from jaxft.weights.numbers import has_own

Array = jax.Array

HEADS = {
    None: "BertModel",
    "classification": "BertForSequenceClassification",
    "masked_lm": "BertForMaskedLM",
    "next_sentence": "BertForNextSentencePrediction",
}
READ_AS = {"BertForPreTraining": "masked_lm"}  # it has both heads of pre-training


@dataclass(frozen=True)
class Config:
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    """Dropout before the classifier; None: ``hidden_dropout_prob``."""
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    """Its embedding is never trained through look-ups, as with torch's ``padding_idx``."""
    tie_word_embeddings: bool = True
    """The masked-LM decoder is the word embedding table."""
    pooler: bool = True
    """Whether there is a pooler beside the bare encoder; the classification and next-sentence heads always have one."""
    num_labels: int = 2

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "type_vocab_size", "num_labels"):
            if getattr(self, name) < 1:
                raise UserError(f"model.arch: {name}={getattr(self, name)} must be at least 1")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise UserError(f"model.arch: pad_token_id={self.pad_token_id} is not among {self.vocab_size} tokens")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise UserError(f"model.arch: {name}={getattr(self, name)} must lie in 0..1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.arch: hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"model.arch.hidden_act={self.hidden_act!r}: {nearest(self.hidden_act, ACTIVATIONS)}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


TINY = Config(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
)


class Output(NamedTuple):
    """What a forward pass gives."""

    hidden: Array
    """[B, S, D], after the last layer."""
    pooled: Array | None
    """[B, D], tanh of an affine map of the first token; None without a pooler."""
    logits: Array | None
    """float32; classification [B, C], next_sentence [B, 2], masked_lm [B, S (or M), V]; None without a head."""
    score: TokenScore | None = None
    """Of the masked-LM head, instead of logits, where there are targets and ``compute.vocab_tile`` is set."""
    hidden_states: Array | None = None
    """[L + 1, B, S, D], the embeddings and what each layer gives; None unless asked for."""


def _normal(config: Config) -> Any:
    return nn.initializers.normal(config.initializer_range)


class Attention(nn.Module):
    """Multi-head self-attention with its residual connection and norm."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, mask: MaskSpec, key: Array | None) -> Array:
        c, rules = self.config, self.compute.rules
        d, n, h = c.hidden_size, c.num_attention_heads, c.head_size

        of_weights, of_output = subkey(key, 0), subkey(key, 1)
        drops = key is not None and c.attention_probs_dropout_prob > 0.0
        last = tokens_last((x.shape[0], n, x.shape[1], h), n, mask, self.compute, drops)
        names = ("embed", "heads", None)
        projections = [
            Projection((d, n, h), names, self.compute, _normal(c), name=name)() for name in ("query", "key", "value")
        ]
        q, k, v = (
            rules.constrain(y, "batch", "act_heads", "length", None)
            for y in project_together(x, projections, names, self.compute, last)
        )
        mixed = attend(q, k, v, mask, self.compute, c.attention_probs_dropout_prob, of_weights)
        out = FromHeads((n, h, d), ("heads", None, "embed"), self.compute, _normal(c), name="out")(mixed, last)
        out = dropout(out, c.hidden_dropout_prob, of_output, self.compute.dropout_bits)
        return LayerNorm(c.layer_norm_eps, self.compute, name="norm")(x + out)


class Mlp(nn.Module):
    """Two affine maps with an activation between, with residual connection and norm."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, key: Array | None) -> Array:
        c, rules = self.config, self.compute.rules
        d, f = c.hidden_size, c.intermediate_size
        up = Linear((d, f), ("embed", "mlp"), self.compute, _normal(c), name="up")(x)
        up = rules.constrain(up, "batch", "length", "act_mlp")
        act = ACTIVATIONS[c.hidden_act]
        down = Linear((f, d), ("mlp", "embed"), self.compute, _normal(c), act=act, name="down")(up)
        down = dropout(down, c.hidden_dropout_prob, subkey(key, 0), self.compute.dropout_bits)
        return LayerNorm(c.layer_norm_eps, self.compute, name="norm")(x + down)


class Layer(nn.Module):
    """One encoder layer: post-norm attention, then post-norm MLP."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, key: Array | None, mask: MaskSpec) -> Array:
        x = Attention(self.config, self.compute, name="attention")(x, mask, subkey(key, 0))
        x = Mlp(self.config, self.compute, name="mlp")(x, subkey(key, 1))
        return self.compute.rules.constrain(x, "batch", "length", "act_embed")


class Embeddings(nn.Module):
    """Sum of token, position and token-type vectors, normalised."""

    config: Config
    compute: Compute

    def setup(self) -> None:
        c = self.config

        def table(rows: int, axis: str) -> Embed:
            return Embed(rows, c.hidden_size, (axis, "embed"), self.compute, _normal(c))

        self.token = table(c.vocab_size, "vocab")
        self.position = table(c.max_position_embeddings, "positions")
        self.type = table(c.type_vocab_size, "types")
        self.norm = LayerNorm(c.layer_norm_eps, self.compute)

    def __call__(self, tokens: Array, types: Array, positions: Array, key: Array | None) -> Array:
        words = self.token(tokens)
        if self.config.pad_token_id is not None:
            frozen = (tokens == self.config.pad_token_id)[..., None]
            words = jnp.where(frozen, jax.lax.stop_gradient(words), words)
        x = words + self.type(types) + self.position(positions)
        x = self.compute.rules.constrain(self.norm(x), "batch", "length", "act_embed")
        return dropout(x, self.config.hidden_dropout_prob, key, self.compute.dropout_bits)


class MaskedLmHead(nn.Module):
    """Affine, activation, norm, then the vocabulary."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, hidden: Array, words: Array, targets: Array | None) -> Array | TokenScore:
        c = self.config
        x = Linear((c.hidden_size,) * 2, ("embed", "pooled"), self.compute, _normal(c), name="dense")(hidden)
        x = LayerNorm(c.layer_norm_eps, self.compute, name="norm")(ACTIVATIONS[c.hidden_act](x))
        dtype = self.compute.param_dtype
        bias = declare(self, "bias", nn.initializers.zeros, ("vocab",), (c.vocab_size,), dtype)
        if c.tie_word_embeddings:
            table = words
        else:
            table = declare(self, "kernel", _normal(c), ("embed", "vocab"), (c.hidden_size, c.vocab_size), dtype).T
        if targets is not None and self.compute.vocab_tile is not None:
            return score_tokens(x, table, bias, targets, self.compute)
        return vocabulary_logits(x, table, bias, self.compute, "predicted")


class ClassHead(nn.Module):
    """Dropout and one affine map of the pooled vector."""

    config: Config
    compute: Compute
    classes: int
    rate: float

    @nn.compact
    def __call__(self, pooled: Array | None, key: Array | None) -> Array:
        assert pooled is not None  # models with this head have a pooler
        x = dropout(pooled, self.rate, key, self.compute.dropout_bits)
        shape = (self.config.hidden_size, self.classes)
        # [B, C] is tiny: full precision costs nothing and keeps probabilities clean.
        exact = Compute(param_dtype=self.compute.param_dtype, rules=self.compute.rules)
        return Linear(shape, ("embed", "classes"), exact, _normal(self.config), name="linear")(x)


class Model(nn.Module):
    """The encoder, with a pooler and head as asked."""

    config: Config
    head: str | None = None
    compute: Compute = Compute()

    CAUSAL = False
    INPUTS = ("tokens", "mask", "types", "positions", "segments", "predict", "targets")

    @nn.compact
    @usual_promotion
    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        types: Array | None = None,
        positions: Array | None = None,
        segments: Array | None = None,
        predict: Array | None = None,
        targets: Array | None = None,
        key: Array | None = None,
        hidden_states: bool = False,
        **unknown: Any,
    ) -> Output:
        """Runs the model.

        Args:
          tokens: [B, S] int32 ids.
          mask: [B, S], 0 or False where a token is padding. None: nothing is.
          types: [B, S] int32 token types (0 first text, 1 second). None: all 0.
          positions: [B, S] int32. None: 0..S-1 in each row.
          segments: [B, S] int32 for packed rows, 0 is padding; tokens see only their own segment.
          predict: [B, M] int32 positions for the masked-LM head, which sees no others. None: all.
          targets: [B, M] int32, what stands there; used where ``compute.vocab_tile`` is set.
          key: dropout key; so is ``rngs={"dropout": key}`` of ``apply``. None: deterministic.
          hidden_states: whether to give what went into the first layer and came out of each, too.

        Raises:
          UserError: S is beyond the position table; an argument that there is not, two keys, or a mesh of explicit axes.
        """
        key = checked_call(self, tokens, key, unknown, (*self.INPUTS, "key", "hidden_states"))
        c, (b, s) = self.config, tokens.shape
        if s > c.max_position_embeddings:
            raise UserError(f"sequence length {s} is beyond the model's position table of {c.max_position_embeddings}")
        types = jnp.zeros((b, s), jnp.int32) if types is None else types
        positions = jnp.broadcast_to(jnp.arange(s), (b, s)) if positions is None else positions
        spec = MaskSpec(None if mask is None else mask.astype(bool), segments)

        embeddings = Embeddings(c, self.compute, name="embed")
        x = embeddings(tokens, types, positions, subkey(key, 0))
        layer = Layer(c, self.compute, parent=None)
        layers = stacked_params(self, "layers", layer, c.num_hidden_layers, x[:1], None, MaskSpec())
        hidden, states = apply_stack(layer, layers, c.num_hidden_layers, x, subkey(key, 1), spec, keep=hidden_states)

        pooled = None
        if self.head in ("classification", "next_sentence") or (self.head is None and c.pooler):
            dense = Linear((c.hidden_size,) * 2, ("embed", "pooled"), self.compute, _normal(c), name="pooler")
            pooled = jnp.tanh(dense(hidden[:, 0]))
        # Most tokens are not predicted: gathered first, they never meet the vocabulary.
        seen = hidden if predict is None else jnp.take_along_axis(hidden, predict[..., None], axis=1)
        if self.head == "masked_lm":
            made = MaskedLmHead(c, self.compute, name="head")(seen, embeddings.token.embedding, targets)
            scored = isinstance(made, TokenScore)
            return Output(hidden, pooled, None if scored else made, made if scored else None, states)
        return Output(hidden, pooled, self._logits(pooled, subkey(key, 2)), None, states)

    def _logits(self, pooled: Array | None, key: Array | None) -> Array | None:
        c = self.config
        match self.head:
            case None:
                return None
            case "classification":
                rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
                return ClassHead(c, self.compute, c.num_labels, rate, name="head")(pooled, key)
            case "next_sentence":
                return ClassHead(c, self.compute, 2, 0.0, name="head")(pooled, None)
        raise UserError(f"bert has no head {self.head!r}: {nearest(str(self.head), [h for h in HEADS if h])}")


# ------------------------------------------------------------------------------------------------ Hugging Face layout

_SAME_NAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id"),
    *("tie_word_embeddings",),
)


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: the file asks for something else than a BERT encoder with absolute positions.
    """
    if hf.get("position_embedding_type") not in (None, "absolute"):
        raise UserError(
            f"config.json: position_embedding_type={hf['position_embedding_type']!r} is not supported (only 'absolute')"
        )
    for flag in ("is_decoder", "add_cross_attention"):
        if hf.get(flag):
            raise UserError(f"config.json: {flag}=true is not supported; bert here is an encoder")
    return {name: hf[name] for name in _SAME_NAME if name in hf}


def config_to_hf(config: Config) -> dict[str, Any]:
    """The reference's config.json of ``config``, without label names and architecture."""
    return {"model_type": "bert", **{name: getattr(config, name) for name in _SAME_NAME}}


SUPERSEDED = ("is_decoder", "add_cross_attention", "position_embedding_type")
"""Keys of config.json that exports leave out: all that is supported is the reference's default, which some files call null."""

# What a task may need that a checkpoint need not have; initialised afresh, and said.
_FRESH = ("head/*", "pooler/*")
# Known, harmless leftovers: buffers, and heads that the task does not use.
_LEFTOVERS = (
    "*embeddings.position_ids",
    "*embeddings.token_type_ids",
    "cls.*",
    "classifier.*",
    "qa_outputs.*",
    "*pooler.dense.*",
)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    # gamma and beta: LayerNorm in the original TensorFlow port, still on the hub.
    return Layout(_rules(config, head), "bert.", ((".gamma", ".weight"), (".beta", ".bias")), _LEFTOVERS, _FRESH)


def head_of(names: Collection[str]) -> str | None:
    """The head that tensor names alone show; it may be one that :data:`HEADS` does not have."""
    if "qa_outputs.weight" in names:
        return "question_answering"
    if "classifier.weight" in names:
        # The classifier of single tokens has the same name, and no pooler.
        pooled = any(name.endswith("pooler.dense.weight") for name in names)
        return "classification" if pooled else "token_classification"
    if any(name.startswith("cls.predictions.") for name in names):
        return "masked_lm"
    return "next_sentence" if "cls.seq_relationship.weight" in names else None


def config_of_weights(weights: Weights) -> dict[str, Any]:
    """What tensors alone say about the Config; believed over config.json."""
    said: dict[str, Any] = {"pooler": any(name.endswith("pooler.dense.weight") for name in weights.names())}
    if "classifier.weight" in weights.names():
        said["num_labels"] = weights.shape("classifier.weight")[0]
    # transformers ties the two only where they are equal, whatever config.json says.
    if has_own(weights, "cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"):
        said["tie_word_embeddings"] = False
    return said


def _rules(config: Config, head: str | None) -> tuple[Rule, ...]:
    """The weight table: ours, theirs, and how theirs is rearranged into ours (einops; None: as it is)."""
    # A tied decoder may be the only one of the two that a file has.
    tied = ("cls.predictions.decoder.weight",) if head == "masked_lm" and config.tie_word_embeddings else ()
    base = (
        Rule("embed/token/embedding", "bert.embeddings.word_embeddings.weight", spares=tied),
        Rule("embed/position/embedding", "bert.embeddings.position_embeddings.weight"),
        Rule("embed/type/embedding", "bert.embeddings.token_type_embeddings.weight"),
        *_pair("embed/norm", "bert.embeddings.LayerNorm"),
    )
    of_layer = "bert.encoder.layer.{layer}"
    layers = (
        *(
            rule
            for name in ("query", "key", "value")
            for rule in (
                Rule(f"layers/attention/{name}/kernel", f"{of_layer}.attention.self.{name}.weight", "(n h) d -> d n h"),
                Rule(f"layers/attention/{name}/bias", f"{of_layer}.attention.self.{name}.bias", "(n h) -> n h"),
            )
        ),
        Rule("layers/attention/out/kernel", f"{of_layer}.attention.output.dense.weight", "d (n h) -> n h d"),
        Rule("layers/attention/out/bias", f"{of_layer}.attention.output.dense.bias"),
        *_pair("layers/attention/norm", f"{of_layer}.attention.output.LayerNorm"),
        *_dense("layers/mlp/up", f"{of_layer}.intermediate.dense"),
        *_dense("layers/mlp/down", f"{of_layer}.output.dense"),
        *_pair("layers/mlp/norm", f"{of_layer}.output.LayerNorm"),
    )
    pooler = _dense("pooler", "bert.pooler.dense")
    match head:
        case None:
            return (*base, *layers, *(pooler if config.pooler else ()))
        case "classification":
            return (*base, *layers, *pooler, *_dense("head/linear", "classifier"))
        case "next_sentence":
            return (*base, *layers, *pooler, *_dense("head/linear", "cls.seq_relationship"))
    if config.tie_word_embeddings:
        of_decoder = ("cls.predictions.decoder.bias",)
        decoder: tuple[Rule, ...] = (Rule("head/bias", "cls.predictions.bias", preferred=of_decoder),)
    else:
        # transformers v5 reads decoder.bias; v4 tied the two and stored the other name only.
        bias, copy = "cls.predictions.decoder.bias", "cls.predictions.bias"
        decoder = (
            Rule("head/kernel", "cls.predictions.decoder.weight", "v d -> d v"),
            Rule("head/bias", bias, None, (copy,)),
        )
    return (
        *base,
        *layers,
        *_dense("head/dense", "cls.predictions.transform.dense"),
        *_pair("head/norm", "cls.predictions.transform.LayerNorm"),
        *decoder,
    )


def _dense(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}/kernel", f"{theirs}.weight", "o i -> i o"), Rule(f"{ours}/bias", f"{theirs}.bias")


def _pair(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")
