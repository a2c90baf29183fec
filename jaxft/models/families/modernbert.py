"""ModernBERT (Warner et al. 2024), as `transformers` computes it (`ModernBertModel` and its heads).

A pre-norm encoder with rotary positions. Most layers are local: a token sees those within half of ``local_attention`` on either side.

Dims: B batch, S length, D model width, N heads, H head size, F MLP width, V vocabulary, L layers, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer, PRNGKeyArray, PyTree, Shaped

from jaxft.attention import MaskSpec
from jaxft.attention.probabilities import attention_probabilities
from jaxft.errors import UserError
from jaxft.layers import (
    Compute,
    Embed,
    Initializer,
    LayerNorm,
    Rotary,
    apply_stack,
    checked_call,
    dropout,
    layer_norm,
    project_exactly,
    rotate,
    stacked_params,
    subkey,
    usual_promotion,
)
from jaxft.models import contract
from jaxft.models.block_files import BlockNames
from jaxft.models.blocks import GatedMlp, RotaryAttention
from jaxft.models.checks import check_fields
from jaxft.models.contract import Facts, Features, Head, Output, Stack, head_named, text_inputs
from jaxft.models.heads import MaskedLm, Transform, TransformedClasses, answered, dense_rules, norm_rules, pooled_texts
from jaxft.models.layer_types import GLOBAL, LOCAL, Kind, alternating, rotaries_from_hf, rotaries_to_hf, types_from_hf
from jaxft.models.layout import Layout, Rule, Tensors, has_own

Array = jax.Array

MODEL_TYPES = {"modernbert": "ModernBert"}
_BASES = {GLOBAL: ("global_rope_theta", 160_000.0), LOCAL: ("local_rope_theta", 10_000.0)}
_BEGINS = {"norm": 1}
"""Layer 0 has no norm before its attention: the one behind the embeddings is enough."""


@dataclass(frozen=True)
class Config:
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    """Fresh weights lie within so many standard deviations."""
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pad_token_id: int | None = 50283
    """Its embedding is never trained through look-ups, as with torch's ``padding_idx``."""
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    """Dropout of probabilities of attention, and of its output."""
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    global_attn_every_n_layers: int = 3
    """Layers 0, n, 2 n, ... are global, the others local."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    """Which layers are global and which local, one by one; None: as ``global_attn_every_n_layers`` says."""
    local_attention: int = 128
    """Width of the window of local layers: half of it on either side."""
    global_rope: Rotary = field(default_factory=lambda: Rotary(_BASES[GLOBAL][1]))
    local_rope: Rotary = field(default_factory=lambda: Rotary(_BASES[LOCAL][1]))
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_activation: str = "gelu"
    tie_word_embeddings: bool = True
    """The masked-LM decoder is the word embedding table."""
    num_labels: int = 2

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        more = ("max_position_embeddings", "global_attn_every_n_layers", "local_attention", "num_labels")
        rates = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")
        check_fields(self, (*sizes, *more), rates, ("hidden_activation", "classifier_activation"))
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"model.arch: hidden_size={self.hidden_size} is not a multiple of 2 x "
                f"num_attention_heads={self.num_attention_heads}: heads of an even size are needed for rotary positions"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise UserError(
                f"model.arch: layer_types names {len(self.layer_types)} layers, num_hidden_layers={self.num_hidden_layers}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def types(self) -> tuple[str, ...]:
        """The type of each layer: global or local."""
        return self.layer_types or alternating(self.global_attn_every_n_layers, self.num_hidden_layers)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is static and differs by layer, for each one."""
        window = self.local_attention // 2 + 1  # itself is in it
        of_type = {GLOBAL: (self.global_rope, None), LOCAL: (self.local_rope, window)}
        return tuple(Kind(*of_type[name], normed=i >= _BEGINS["norm"]) for i, name in enumerate(self.types))

    def initial(self, spread: Literal["in", "out", "classes"] = "in") -> Initializer:
        """The initialiser of weights: by what they come after, as the reference has it."""
        deep = self.initializer_range / math.sqrt(2.0 * self.num_hidden_layers)
        deviation = {"in": self.initializer_range, "out": deep, "classes": self.hidden_size**-0.5}[spread]
        cutoff = self.initializer_cutoff_factor
        return nn.initializers.truncated_normal(deviation, lower=-cutoff, upper=cutoff)


TINY = Config(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, pad_token_id=0,
    max_position_embeddings=64, initializer_range=0.1, embedding_dropout=0.1, attention_dropout=0.1, mlp_dropout=0.1,
    global_attn_every_n_layers=2, local_attention=8,
)  # fmt: skip


class Layer(nn.Module):
    """One encoder layer: pre-norm attention, then pre-norm MLP."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, key: Array | None, mask: MaskSpec, positions: Array, kind: Kind) -> Array:
        c, how, drop = self.config, self.compute, functools.partial(dropout, bits=self.compute.dropout_bits)
        starts, sizes = (c.initial(), c.initial("out")), (c.num_attention_heads, c.num_attention_heads, c.head_size)
        attention = RotaryAttention(
            *sizes, how, *starts, c.attention_dropout, c.attention_bias, together=True, name="attention"
        )
        seen = LayerNorm(c.norm_eps, how, c.norm_bias, name="norm")(x) if kind.normed else x
        mixed, _ = attention(seen, kind.mask(mask, x.shape[1]), positions, subkey(key, 0), kind.rope)
        x = x + drop(mixed, c.attention_dropout, subkey(key, 1))
        seen = LayerNorm(c.norm_eps, how, c.norm_bias, name="mlp_norm")(x)
        sizes = (c.intermediate_size, c.hidden_activation)
        x = x + GatedMlp(*sizes, how, *starts, c.mlp_bias, c.mlp_dropout, name="mlp")(seen, subkey(key, 2))
        return how.rules.constrain(x, "batch", "length", "act_embed")


class Embeddings(nn.Module):
    """Vectors of tokens, normalised."""

    config: Config
    compute: Compute

    def setup(self) -> None:
        c = self.config
        self.token = Embed(c.vocab_size, c.hidden_size, ("vocab", "embed"), self.compute, c.initial())
        self.norm = LayerNorm(c.norm_eps, self.compute, c.norm_bias)

    def __call__(self, tokens: Integer[Array, "B S"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        c, x = self.config, self.token(tokens)
        if c.pad_token_id is not None:
            x = jnp.where((tokens == c.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        x = self.compute.rules.constrain(self.norm(x), "batch", "length", "act_embed")
        return dropout(x, c.embedding_dropout, key, self.compute.dropout_bits)


def _transform(c: Config) -> Transform:
    act, start = c.classifier_activation, c.initial("out")
    return Transform(c.hidden_size, act, c.norm_eps, start, c.classifier_bias, c.norm_bias)


def _classes(suffix: str, classes: Literal["rows", "tokens"] | None, outputs: int | None = None) -> Head[Config]:
    """A head with classes, or with so many outputs: the ends of an answer, a choice. Their tensors have the same names."""
    pooled = classes == "rows" or outputs == contract.ONE_CHOICE
    marks = ("head.dense.weight", "classifier.weight") if outputs != contract.ONE_CHOICE else ()

    def make(c: Config, compute: Compute, name: str) -> TransformedClasses:
        sizes = (c.num_labels if outputs is None else outputs, c.classifier_dropout)
        return TransformedClasses(_transform(c), *sizes, pooled, compute, c.initial("classes"), name=name)

    def rules(c: Config) -> tuple[Rule, ...]:
        return (*_transform(c).rules("head.dense", "head.norm"), *dense_rules("head/linear", "classifier"))

    return Head(suffix, make, rules, marks, classes, pooled)


def _masked_lm(c: Config, compute: Compute, name: str) -> MaskedLm:
    return MaskedLm(_transform(c), c.vocab_size, c.tie_word_embeddings, compute, c.decoder_bias, name=name)


def _masked_lm_rules(c: Config) -> tuple[Rule, ...]:
    kernel = () if c.tie_word_embeddings else (Rule("head/kernel", "decoder.weight", "v d -> d v"),)
    bias = (Rule("head/bias", "decoder.bias"),) if c.decoder_bias else ()
    return (*_transform(c).rules("head.dense", "head.norm"), *kernel, *bias)


HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "classification": _classes("ForSequenceClassification", "rows"),
    "token_classification": _classes("ForTokenClassification", "tokens"),
    "question_answering": _classes("ForQuestionAnswering", None, contract.SPAN_ENDS),
    "multiple_choice": _classes("ForMultipleChoice", None, contract.ONE_CHOICE),
    "masked_lm": Head("ForMaskedLM", _masked_lm, _masked_lm_rules, ("head.dense.weight",)),
}


class Model(nn.Module):
    """The encoder, with a head as asked."""

    config: Config
    head: str | None = None
    compute: Compute = Compute()

    @property
    def facts(self) -> Facts:
        return facts(self.config)

    @nn.compact
    @usual_promotion
    def __call__(
        self,
        tokens: Integer[Array, "B S"],
        mask: Shaped[Array, "B S"] | None = None,
        positions: Integer[Array, "B S"] | None = None,
        segments: Integer[Array, "B S"] | None = None,
        starts: Integer[Array, "B E"] | None = None,
        predict: Integer[Array, "B M"] | None = None,
        targets: Integer[Array, "B M"] | None = None,
        key: PRNGKeyArray | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        **unknown: object,
    ) -> Output:
        """Runs the model.

        Args:
          tokens: ids.
          mask: 0 or False where a token is padding. None: nothing is.
          positions: of the tokens. None: 0..S-1 in each row.
          segments: for packed rows, 0 is padding; tokens see only their own segment.
          starts: where each text of packed rows begins: each is pooled. None: the first is.
          predict: positions for the masked-LM head, which sees no others. None: all.
          targets: what stands there; used where ``compute.vocab_tile`` is set.
          key: dropout key; so is ``rngs={"dropout": key}`` of ``apply``. None: deterministic.
          hidden_states: whether to give what went into the first layer and came out of each, too.
          attentions: whether to give the probabilities of attention, before dropout, computed apart from the backend.

        Raises:
          UserError: S is beyond ``max_position_embeddings`` and no positions are given; an argument that there is not, two keys, or
            a mesh of explicit axes.
        """
        key = checked_call(self, tokens, key, unknown, (*self.facts.inputs, "key", "hidden_states", "attentions"))
        head = head_named("modernbert", self.head, HEADS)
        c, (b, s) = self.config, tokens.shape
        if positions is None and s > c.max_position_embeddings:
            raise UserError(f"sequence length {s} is beyond the model's limit of {c.max_position_embeddings} positions")
        positions = jnp.broadcast_to(jnp.arange(s), (b, s)) if positions is None else positions
        spec = MaskSpec(None if mask is None else mask.astype(bool), segments)

        embed = Embeddings(c, self.compute, name="embed")
        x = embed(tokens, subkey(key, 0))
        layer = Layer(c, self.compute, parent=None)
        example = (x[:1], None, MaskSpec(), positions[:1], c.kinds[-1])
        layers = stacked_params(self, "layers", layer, c.num_hidden_layers, *example, begins=_BEGINS)
        stack = (layer, layers, c.num_hidden_layers, x, subkey(key, 1), spec, positions)
        x, states, _ = apply_stack(*stack, keep=hidden_states or attentions, kinds=c.kinds, begins=_BEGINS)
        looked = _attentions(c, layers, states, spec, positions) if attentions and states is not None else None
        hidden = LayerNorm(c.norm_eps, self.compute, c.norm_bias, name="norm")(x)
        # The last one normalised, as the reference has it.
        states = states.at[-1].set(hidden) if hidden_states and states is not None else None
        more = {"hidden_states": states, "attentions": looked}
        behind = self.head == "multiple_choice"
        pooled = pooled_texts(c.classifier_pooling, hidden, mask, segments, starts, behind) if head.pooled else None
        made = None if head.make is None else head.make(c, self.compute, "head")
        features = Features(hidden, pooled, embed.token.embedding, targets, starts)
        return answered(made, features, subkey(key, 2), predict, **more)


def _attentions(c: Config, layers: PyTree[Array], states: Array, mask: MaskSpec, positions: Array) -> Array:
    """[L, B, N, S, S] float32, from the layers' stacked parameters and what went into each."""

    def looked(number: int, kind: Kind) -> Array:
        x = states[number].astype(jnp.float32)
        if kind.normed:
            norm = {part: value[number - _BEGINS["norm"]] for part, value in layers["norm"].items()}
            x = layer_norm(x, norm["scale"], norm.get("bias", jnp.zeros_like(norm["scale"])), c.norm_eps)

        maps = (layers["attention"][name] for name in ("query", "key"))
        q, k = (rotate(project_exactly(x, one, number), positions, kind.rope) for one in maps)
        return attention_probabilities(q, k, kind.mask(mask, x.shape[1]))

    return jnp.stack([looked(number, kind) for number, kind in enumerate(c.kinds)])


def facts(config: Config) -> Facts:
    """What the rest of jaxft may know of an encoder."""
    limit, heads = config.max_position_embeddings, config.num_attention_heads
    inputs = text_inputs(config.vocab_size, config.pad_token_id, limit, scored="predicted", starts=contract.STARTS)
    sizes, windows = (config.hidden_size, heads, heads, config.head_size), tuple(kind.window for kind in config.kinds)
    return Facts(inputs, (Stack("layers", config.num_hidden_layers, *sizes, windows=windows),), limit)


# ------------------------------------------------------------------------------------------------ Hugging Face layout

_OWN = ("global_attn_every_n_layers", "layer_types", "global_rope", "local_rope", "num_labels")
_SAME_NAME = tuple(one.name for one in dataclasses.fields(Config) if one.name not in _OWN)
# How the reference computes, not what: compilation, determinism and padding of its kernels, losses of predicted tokens alone.
_MEANINGLESS = ("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad", "sparse_prediction")
SUPERSEDED = ("global_rope_theta", "local_rope_theta", "rope_scaling", "rope_theta", *_MEANINGLESS)


_BLOCK = BlockNames("model.layers.{layer}", ("attn.Wqkv",), "attn.Wo", ("mlp.Wi",), "mlp.Wo")


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: a type of layer or rotary positions that are not supported.
    """
    layers: Any = hf.get("num_hidden_layers", Config.num_hidden_layers)
    types = types_from_hf(hf, layers, Config.global_attn_every_n_layers)
    ropes = rotaries_from_hf(hf, _BASES, Config.max_position_embeddings)
    same = {name: hf[name] for name in _SAME_NAME if name in hf}
    return {**same, **types, "global_rope": ropes[GLOBAL], "local_rope": ropes[LOCAL]}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    same = {name: getattr(config, name) for name in _SAME_NAME}
    types = {"layer_types": list(config.types), "global_attn_every_n_layers": config.global_attn_every_n_layers}
    ropes = rotaries_to_hf({GLOBAL: config.global_rope, LOCAL: config.local_rope})
    return {**same, **types, "rope_parameters": ropes}


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    said: dict[str, object] = {}
    if "classifier.weight" in weights.names():
        said["num_labels"] = weights.shape("classifier.weight")[0]
    # transformers ties the two only where they are equal, whatever config.json says.
    if has_own(weights, "decoder.weight", "embeddings.tok_embeddings.weight"):
        said["tie_word_embeddings"] = False
    return said


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    leftovers = ("*rotary_emb.*inv_freq", "head.*", "classifier.*", "decoder.*")
    # A tied decoder may be the only one of the two that a file has.
    tied = ("decoder.weight",) if head == "masked_lm" and config.tie_word_embeddings else ()
    embed = Rule("embed/token/embedding", "model.embeddings.tok_embeddings.weight", spares=tied)
    norms = norm_rules("embed/norm", "model.embeddings.norm", config.norm_bias)
    rules = (embed, *norms, *_layer_rules(config), *norm_rules("norm", "model.final_norm", config.norm_bias))
    return Layout((*rules, *HEADS[head].rules(config)), "model.", (), leftovers, ("head/*",))


def _layer_rules(c: Config) -> tuple[Rule, ...]:
    """The layers' rows of the weight table."""
    norm = norm_rules("layers/norm", f"{_BLOCK.layer}.attn_norm", c.norm_bias, _BEGINS["norm"])
    return (
        *(norm if c.num_hidden_layers > _BEGINS["norm"] else ()),
        *_BLOCK.rules(c.attention_bias, c.mlp_bias),
        *norm_rules("layers/mlp_norm", f"{_BLOCK.layer}.mlp_norm", c.norm_bias),
    )
