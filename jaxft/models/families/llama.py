"""Llama (Touvron et al. 2023), as `transformers` computes it (`LlamaModel`, `LlamaForCausalLM`, and its classes for texts and tokens).

Dims: B batch, S length, D model width, N query heads, K key/value heads, H head size, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    RMSNorm,
    Rotary,
    TokenScore,
    apply_stack,
    checked_call,
    project_exactly,
    rms_norm,
    rotate,
    stacked_params,
    subkey,
    usual_promotion,
)
from jaxft.models.block_files import LLAMAS
from jaxft.models.blocks import GatedMlp, KeysAndValues, RotaryAttention
from jaxft.models.caches import Cache
from jaxft.models.checks import check_fields
from jaxft.models.contract import STARTS, Facts, Features, Head, Output, Stack, head_named, text_inputs
from jaxft.models.heads import LastTokenClasses, TokenClasses, Vocabulary, dense_rules, normal
from jaxft.models.layout import Layout, Rule, Tensors, has_own
from jaxft.models.rotary_files import SUPERSEDED_KEYS, rotary_from_hf, rotary_to_hf

Array = jax.Array

MODEL_TYPES = {"llama": "Llama"}
_OPTIONS = ("key", "hidden_states", "attentions", "cache")


@dataclass(frozen=True)
class Config:
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: ``hidden_size / num_attention_heads``."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope: Rotary = field(default_factory=Rotary)
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    pad_token_id: int | None = None
    """Its embedding is never trained through look-ups, as with torch's ``padding_idx``."""
    tie_word_embeddings: bool = False
    num_labels: int = 2
    classifier_dropout: float | None = None
    """Dropout before tokens are classified. None: 0.1, as the reference has it."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes = (*sizes, "max_position_embeddings", "num_key_value_heads", "head_dim", "num_labels")
        check_fields(self, sizes, ("attention_dropout", "classifier_dropout"), ("hidden_act",))
        if self.num_attention_heads % self.key_heads:
            raise UserError(
                f"model.arch: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.key_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.arch: hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise UserError(f"model.arch: the head size {self.head_size} must be even for rotary positions")

    @property
    def class_dropout(self) -> float:
        return 0.1 if self.classifier_dropout is None else self.classifier_dropout

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


TINY = Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_dropout=0.1,
    initializer_range=0.1,
)


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
        state: KeysAndValues | None = None,
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], KeysAndValues | None]:
        """The next layer's input; with ``state``, keys and values of a cache, those of these tokens too."""
        c, start = self.config, normal(self.config)

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(c.rms_norm_eps, self.compute, name=name)(x)

        sizes = (c.num_attention_heads, c.key_heads, c.head_size)
        attention = RotaryAttention(
            *sizes, self.compute, start, start, c.attention_dropout, c.attention_bias, name="attention"
        )
        mixed, new = attention(norm("norm", x), mask, positions, key, c.rope, state)
        x = x + mixed
        mlp = GatedMlp(c.intermediate_size, c.hidden_act, self.compute, start, start, c.mlp_bias, name="mlp")
        x = x + mlp(norm("mlp_norm", x))
        x = self.compute.rules.constrain(x, "batch", "length", "act_embed")
        return x if state is None else (x, new)


def _causal_lm_rules(config: Config) -> tuple[Rule, ...]:
    return () if config.tie_word_embeddings else (Rule("head/kernel", "lm_head.weight", "v d -> d v"),)


HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "token_classification": Head(
        "ForTokenClassification",
        lambda c, compute, name: TokenClasses(
            c.hidden_size, c.num_labels, c.class_dropout, compute, normal(c), name=name
        ),
        lambda c: dense_rules("head/linear", "score"),
        marks=("score.weight", "score.bias"),
        classes="tokens",
    ),
    "classification": Head(
        "ForSequenceClassification",
        lambda c, compute, name: LastTokenClasses(c.hidden_size, c.num_labels, compute, normal(c), name=name),
        lambda c: dense_rules("head/linear", "score", biased=False),
        marks=("score.weight",),
        classes="rows",
    ),
    "causal_lm": Head(
        "ForCausalLM",
        lambda c, compute, name: Vocabulary(
            c.hidden_size, c.vocab_size, c.tie_word_embeddings, compute, normal(c), name=name
        ),
        _causal_lm_rules,
        # A head with tied embeddings has no tensor of its own: the decoder's prefix tells.
        marks=("model.*",),
    ),
}


class Model(nn.Module):
    """The decoder, with a head as asked."""

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
        targets: Integer[Array, "B S"] | None = None,
        key: PRNGKeyArray | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        cache: Cache | None = None,
        **unknown: object,
    ) -> Output:
        """Runs the model.

        Args:
          tokens: ids.
          mask: 0 or False where a token is padding. None: nothing is.
          positions: of the tokens. None: 0..S-1 in each row; with a cache, padding apart, they count on.
          segments: for packed rows, 0 is padding; tokens see only their own segment.
          starts: where each text of packed rows begins; logits of rows are then those of texts.
          targets: the next tokens; used where ``compute.vocab_tile`` is set.
          key: dropout key; so is ``rngs={"dropout": key}`` of ``apply``. None: deterministic.
          hidden_states: whether to give what went into the first layer and came out of each, too.
          attentions: whether to give the probabilities of attention, before dropout, computed apart from the backend.
          cache: what the model keeps of the tokens before these (:func:`jaxft.models.caches.init_cache`); the output has the next
            one. In a program, which cannot know how many places are filled, tokens beyond the last one give NaN.

        Raises:
          UserError: S is beyond ``max_position_embeddings`` and no positions are given, or beyond the cache's places; an argument that
            there is not, two keys, or a mesh of explicit axes; segments or attentions with a cache.
        """
        key = checked_call(self, tokens, key, unknown, (*self.facts.inputs, *_OPTIONS))
        head = head_named("llama", self.head, HEADS)
        c, (b, s) = self.config, tokens.shape
        if positions is None and s > c.max_position_embeddings:
            raise UserError(f"sequence length {s} is beyond the model's limit of {c.max_position_embeddings} positions")
        if cache is None:
            positions = jnp.broadcast_to(jnp.arange(s), (b, s)) if positions is None else positions
            spec = MaskSpec(None if mask is None else mask.astype(bool), segments, causal=True)
        elif segments is None and not attentions:
            cache, positions, spec = cache.admitted(tokens, mask, positions)
        else:
            raise UserError(
                f"a cache is of one text a row: no {'attentions' if segments is None else 'segments'} with it"
            )

        embed = Embed(c.vocab_size, c.hidden_size, ("vocab", "embed"), self.compute, normal(c), name="embed")
        x = embed(tokens)
        if c.pad_token_id is not None:
            x = jnp.where((tokens == c.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        x = self.compute.rules.constrain(x, "batch", "length", "act_embed")
        layer = Layer(c, self.compute, parent=None)
        example = (x[:1], None, MaskSpec(causal=True), positions[:1])
        layers = stacked_params(self, "layers", layer, c.num_hidden_layers, *example)
        stack = (layer, layers, c.num_hidden_layers, x, subkey(key, 1), spec, positions)
        past = None if cache is None else (cache.keys, cache.values)
        x, states, new = apply_stack(*stack, keep=hidden_states or attentions, state=past)
        looked = _attentions(c, layers, states, spec, positions) if attentions and states is not None else None
        hidden = RMSNorm(c.rms_norm_eps, self.compute, name="norm")(x)
        if cache is not None and new is not None:
            hidden, cache = cache.with_room(hidden), cache.extended(*new)
        # The last one normalised, as the reference has it.
        states = states.at[-1].set(hidden) if hidden_states and states is not None else None
        more = {"hidden_states": states, "attentions": looked, "cache": cache}
        if head.make is None:
            return Output(hidden, **more)
        features = Features(hidden, None, embed.embedding, targets, starts, mask, segments)
        made = head.make(c, self.compute, "head")(features, subkey(key, 2))
        if isinstance(made, TokenScore):
            return Output(hidden, score=made, **more)
        return Output(hidden, logits=made, **more)


def _attentions(
    config: Config, layers: PyTree[Array], states: Float[Array, "states B S D"], mask: MaskSpec, positions: Array
) -> Array:
    """[L, B, N, S, S] float32, from the layers' stacked parameters and what went into each."""

    def heads(name: str, number: int) -> Array:
        x = rms_norm(states[number].astype(jnp.float32), layers["norm"]["scale"][number], config.rms_norm_eps)
        return rotate(project_exactly(x, layers["attention"][name], number), positions, config.rope)

    count = config.num_hidden_layers
    return jnp.stack([attention_probabilities(heads("query", i), heads("key", i), mask) for i in range(count)])


def facts(config: Config) -> Facts:
    """What the rest of jaxft may know of a decoder."""
    limit = config.max_position_embeddings
    inputs = text_inputs(config.vocab_size, config.pad_token_id, limit, scored="length", starts=STARTS)
    sizes = (config.hidden_size, config.num_attention_heads, config.key_heads, config.head_size)
    stack = Stack("layers", config.num_hidden_layers, *sizes, causal=True)
    return Facts(inputs, (stack,), config.max_position_embeddings)


# ------------------------------------------------------------------------------------------------ Hugging Face layout

_SAME_NAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "attention_bias", "mlp_bias", "attention_dropout", "pad_token_id", "tie_word_embeddings"),
    "classifier_dropout",
)
SUPERSEDED = SUPERSEDED_KEYS


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: the file asks for rotary positions of a kind that is not supported, or leaves out what the kind needs.
    """
    return {name: hf[name] for name in _SAME_NAME if name in hf} | {
        "rope": rotary_from_hf(hf, Config.max_position_embeddings)
    }


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type and architecture."""
    same = {name: getattr(config, name) for name in _SAME_NAME}
    sizes = {"num_key_value_heads": config.key_heads, "head_dim": config.head_size}
    return {**same, **sizes, "rope_parameters": rotary_to_hf(config.rope)}


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    leftovers = ("*rotary_emb.inv_freq", "lm_head.*", "score.*")
    return Layout(_rules(config, head), "model.", (), leftovers, ("head/*",))


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    # transformers ties the two only where they are equal, whatever config.json says.
    said: dict[str, object] = {}
    if has_own(weights, "lm_head.weight", "embed_tokens.weight"):
        said["tie_word_embeddings"] = False
    if "score.weight" in weights.names():
        said["num_labels"] = weights.shape("score.weight")[0]
    return said


def _rules(config: Config, head: str | None) -> tuple[Rule, ...]:
    """The weight table: ours, theirs, and how theirs is rearranged into ours (einops; None: as it is)."""
    # A tied head may be the only one of the two that a file has.
    tied = ("lm_head.weight",) if head == "causal_lm" and config.tie_word_embeddings else ()
    rules = (
        Rule("embed/embedding", "model.embed_tokens.weight", spares=tied),
        *LLAMAS.rules(config.attention_bias, config.mlp_bias),
        Rule("layers/norm/scale", f"{LLAMAS.layer}.input_layernorm.weight"),
        Rule("layers/mlp_norm/scale", f"{LLAMAS.layer}.post_attention_layernorm.weight"),
        Rule("norm/scale", "model.norm.weight"),
    )
    return (*rules, *HEADS[head].rules(config))
