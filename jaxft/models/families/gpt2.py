"""GPT-2 (Radford et al. 2019), as `transformers` computes it (`GPT2Model`, `GPT2LMHeadModel`, and its classes for texts, tokens and
answers).

A pre-norm decoder with learned positions. The published shapes of GPT-3 (Brown et al. 2020) are configs of it (`configs/models/gpt3_*`).

Dims: B batch, S length, D model width, N heads, H head size, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax
from jaxtyping import Float, Float32, Integer, PRNGKeyArray, PyTree

from jaxft.attention import MaskSpec, attend, tokens_last
from jaxft.attention.probabilities import attention_probabilities
from jaxft.errors import UserError
from jaxft.layers import (
    ACTIVATIONS,
    Compute,
    Embed,
    FromHeads,
    LayerNorm,
    Linear,
    Projection,
    dropout,
    layer_norm,
    project_exactly,
    project_together,
    subkey,
)
from jaxft.models import causal
from jaxft.models.blocks import KeysAndValues
from jaxft.models.causal import LayerKind
from jaxft.models.checks import check_fields
from jaxft.models.contract import SPAN_ENDS, Head
from jaxft.models.heads import LastTokenClasses, TokenClasses, Vocabulary, dense_rules, norm_rules, normal
from jaxft.models.layout import Layout, Rule, Tensors, has_own

Array = jax.Array

MODEL_TYPES = {"gpt2": "GPT2"}


@dataclass(frozen=True)
class Config:
    """Everything that changes the maths. Field names are those of other families; config.json has others (``_NAMES``)."""

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    """None: four times the width."""
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    """Dropout of what attention and MLP add."""
    classifier_dropout: float | None = None
    """Dropout before tokens are classified. None: 0.1, as the reference has it."""
    scale_attn_weights: bool = True
    """Products of queries and keys are divided by the square root of the head size."""
    scale_attn_by_inverse_layer_idx: bool = False
    """They are divided by the number of the layer too, counted from 1."""
    pad_token_id: int | None = None
    """What rows are padded with; its embedding is trained like any other."""
    tie_word_embeddings: bool = True
    num_labels: int = 2

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        rates = ("embedding_dropout", "attention_dropout", "residual_dropout", "classifier_dropout")
        check_fields(self, (*sizes, "max_position_embeddings", "num_labels"), rates, ("hidden_act",))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.arch: hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )

    @property
    def mlp_width(self) -> int:
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @property
    def class_dropout(self) -> float:
        return 0.1 if self.classifier_dropout is None else self.classifier_dropout

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        return self.num_attention_heads

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What is static and differs by layer, for each one."""
        usual = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        each = range(1, self.num_hidden_layers + 1) if self.scale_attn_by_inverse_layer_idx else ()
        kinds = tuple(LayerKind(scale=usual / number) for number in each)
        return kinds or (LayerKind(scale=usual),) * self.num_hidden_layers

    @property
    def initial_out(self) -> nn.initializers.Initializer:
        """The initialiser of what is added to the residual stream."""
        return nn.initializers.normal(self.initializer_range / math.sqrt(2 * self.num_hidden_layers))


TINY = Config(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip


class Attention(nn.Module):
    """Multi-head self-attention, [B, S, D] to [B, S, D]; and to keys and values that tokens that follow need of these."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: MaskSpec,
        key: PRNGKeyArray | None,
        scale: float | None,
        past: KeysAndValues | None = None,
    ) -> tuple[Float[Array, "B S D"], KeysAndValues | None]:
        c, rules, names = self.config, self.compute.rules, ("embed", "heads", None)
        n, h, (b, s, d) = c.num_attention_heads, c.head_size, x.shape
        drops = key is not None and c.attention_dropout > 0.0
        last = past is None and tokens_last((b, n, s, h), n, mask, self.compute, drops)
        parts = [
            Projection((d, n, h), names, self.compute, normal(c), name=name)() for name in ("query", "key", "value")
        ]
        q, k, v = (
            rules.constrain(y, "batch", "act_heads", "length", None)
            for y in project_together(x, parts, names, self.compute, last)
        )
        new = None
        if past is not None:
            new = (k.astype(past[0].dtype), v.astype(past[1].dtype))
            k, v = (jax.lax.dynamic_update_slice_in_dim(*pair, mask.first, 2) for pair in zip(past, new, strict=True))
        mixed = attend(q, k, v, mask, self.compute, c.attention_dropout, key, scale=scale)
        places = ("heads", None, "embed")
        return FromHeads((n, h, d), places, self.compute, c.initial_out, name="out")(mixed, last), new


class Layer(nn.Module):
    """One decoder layer: pre-norm attention, then pre-norm MLP."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        key: PRNGKeyArray | None,
        mask: MaskSpec,
        positions: Integer[Array, "B S"],
        kind: LayerKind,
        state: KeysAndValues | None = None,
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], KeysAndValues | None]:
        """The next layer's input; with ``state``, keys and values of a cache, those of these tokens too."""
        del positions  # the embeddings have them
        c, how = self.config, self.compute
        seen = LayerNorm(c.layer_norm_eps, how, name="norm")(x)
        mixed, new = Attention(c, how, name="attention")(seen, mask, subkey(key, 0), kind.scale, state)
        x = x + dropout(mixed, c.residual_dropout, subkey(key, 1), how.dropout_bits)
        seen = LayerNorm(c.layer_norm_eps, how, name="mlp_norm")(x)
        x = x + dropout(Mlp(c, how, name="mlp")(seen), c.residual_dropout, subkey(key, 2), how.dropout_bits)
        x = how.rules.constrain(x, "batch", "length", "act_embed")
        return x if state is None else (x, new)


class Mlp(nn.Module):
    """Two affine maps with an activation between."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        c, (d, f) = self.config, (self.config.hidden_size, self.config.mlp_width)
        up = Linear((d, f), ("embed", "mlp"), self.compute, normal(c), name="up")(x)
        up = self.compute.rules.constrain(up, "batch", "length", "act_mlp")
        act = ACTIVATIONS[c.hidden_act]
        return Linear((f, d), ("mlp", "embed"), self.compute, c.initial_out, act=act, name="down")(up)


class Embeddings(nn.Module):
    """Sum of token and position vectors."""

    config: Config
    compute: Compute

    def setup(self) -> None:
        c, how = self.config, self.compute
        self.token = Embed(c.vocab_size, c.hidden_size, ("vocab", "embed"), how, normal(c))
        self.position = Embed(c.max_position_embeddings, c.hidden_size, ("positions", "embed"), how, normal(c))

    def __call__(
        self, tokens: Integer[Array, "B S"], positions: Integer[Array, "B S"], key: PRNGKeyArray | None
    ) -> Float[Array, "B S D"]:
        x = self.compute.rules.constrain(self.token(tokens) + self.position(positions), "batch", "length", "act_embed")
        return dropout(x, self.config.embedding_dropout, key, self.compute.dropout_bits)


HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "classification": Head(
        "ForSequenceClassification",
        lambda c, compute, name: LastTokenClasses(c.hidden_size, c.num_labels, compute, normal(c), name=name),
        lambda c: dense_rules("head/linear", "score", biased=False),
        marks=("score.weight",),
        classes="rows",
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
    "question_answering": Head(
        "ForQuestionAnswering",
        lambda c, compute, name: TokenClasses(c.hidden_size, SPAN_ENDS, 0.0, compute, normal(c), name=name),
        lambda c: dense_rules("head/linear", "qa_outputs"),
        marks=("qa_outputs.weight",),
    ),
    "causal_lm": Head(
        "LMHeadModel",
        lambda c, compute, name: Vocabulary(
            c.hidden_size, c.vocab_size, c.tie_word_embeddings, compute, normal(c), name=name
        ),
        lambda c: () if c.tie_word_embeddings else (Rule("head/kernel", "lm_head.weight", "v d -> d v"),),
        # A head with tied embeddings has no tensor of its own: the decoder's prefix tells.
        marks=("transformer.*",),
    ),
}


class Model(causal.CausalModel[Config]):
    """The decoder, with a head as asked."""

    HEADS = HEADS

    def embedded(
        self, tokens: Integer[Array, "B S"], positions: Integer[Array, "B S"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "V D"]]:
        embed = Embeddings(self.config, self.compute, name="embed")
        return embed(tokens, positions, key), embed.token.embedding

    def layer(self) -> nn.Module:
        return Layer(self.config, self.compute, parent=None)

    def normed(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return LayerNorm(self.config.layer_norm_eps, self.compute, name="norm")(x)

    def looked(
        self,
        layers: PyTree[Array],
        number: int,
        x: Float32[Array, "B S D"],
        mask: MaskSpec,
        positions: Integer[Array, "B S"],
        kind: LayerKind,
    ) -> Float32[Array, "B N S S"]:
        del positions
        scale, bias = (layers["norm"][part][number] for part in ("scale", "bias"))
        seen = layer_norm(x, scale, bias, self.config.layer_norm_eps)
        q, k = (project_exactly(seen, layers["attention"][name], number) for name in ("query", "key"))
        return attention_probabilities(q, k, mask, scale=kind.scale)


facts = causal.facts

# ------------------------------------------------------------------------------------------------ Hugging Face layout

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
    "embedding_dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
    "residual_dropout": "resid_pdrop",
    **{
        name: name
        for name in ("initializer_range", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "pad_token_id",
                     "tie_word_embeddings", "classifier_dropout")
    },
}  # fmt: skip
"""Fields of :class:`Config`, and what config.json calls them."""
_ALSO = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Fields that the reference reads under our names, too."""
# n_ctx: how long rows of the mask were; the reference takes n_positions. Softmax and its logits are float32 here anyway.
SUPERSEDED = (*_ALSO, "n_ctx", "reorder_and_upcast_attn", "hidden_dropout")


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: cross-attention, or one setting that has two names there, and two values.
    """
    if hf.get("add_cross_attention"):
        raise UserError("config.json: add_cross_attention=true is not supported; this family here is a decoder alone")
    found = {ours: hf[theirs] for ours, theirs in _NAMES.items() if theirs in hf}
    for name in _ALSO:
        if hf.get(name) is not None and found.setdefault(name, hf[name]) != hf[name]:
            raise UserError(
                f"config.json: {name}={hf[name]!r} and {_NAMES[name]}={found[name]!r} are one setting: remove one"
            )
    if found.get("classifier_dropout") is None and hf.get("hidden_dropout") is not None:
        found["classifier_dropout"] = hf["hidden_dropout"]
    return found


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    said: dict[str, object] = {}
    # transformers ties the two only where they are equal, whatever config.json says.
    if has_own(weights, "lm_head.weight", "wte.weight"):
        said["tie_word_embeddings"] = False
    for name in ("score.weight", "classifier.weight"):
        if name in weights.names():
            said["num_labels"] = weights.shape(name)[0]
    return said


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    leftovers = ("*.attn.bias", "*.attn.masked_bias", "lm_head.*", "score.*", "classifier.*", "qa_outputs.*")
    # A tied head may be the only one of the two that a file has.
    tied = ("lm_head.weight",) if head == "causal_lm" and config.tie_word_embeddings else ()
    embed = Rule("embed/token/embedding", "transformer.wte.weight", spares=tied)
    rules = (embed, Rule("embed/position/embedding", "transformer.wpe.weight"), *_layer_rules())
    rules = (*rules, *norm_rules("norm", "transformer.ln_f"), *HEADS[head].rules(config))
    return Layout(rules, "transformer.", (), leftovers, ("head/*",))


def _layer_rules() -> tuple[Rule, ...]:
    """The layers' rows of the weight table. Their kernels are stored the other way round (`Conv1D`)."""
    at, parts = "transformer.h.{layer}", tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
    kernels, biases = (tuple(f"{part}/{kind}" for part in parts) for kind in ("kernel", "bias"))
    linear = tuple(
        rule
        for ours, theirs in (("up", "c_fc"), ("down", "c_proj"))
        for rule in (
            Rule(f"layers/mlp/{ours}/kernel", f"{at}.mlp.{theirs}.weight", "o i -> i o", turned=True),
            Rule(f"layers/mlp/{ours}/bias", f"{at}.mlp.{theirs}.bias"),
        )
    )
    return (
        Rule(kernels, f"{at}.attn.c_attn.weight", "(n h) d -> d n h", turned=True),
        Rule(biases, f"{at}.attn.c_attn.bias", "(n h) -> n h"),
        Rule("layers/attention/out/kernel", f"{at}.attn.c_proj.weight", "d (n h) -> n h d", turned=True),
        Rule("layers/attention/out/bias", f"{at}.attn.c_proj.bias"),
        *linear,
        *norm_rules("layers/norm", f"{at}.ln_1"),
        *norm_rules("layers/mlp_norm", f"{at}.ln_2"),
    )
