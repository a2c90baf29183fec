"""The encoder of BERT (Devlin et al. 2018) and of the families that kept it: embeddings, post-norm layers, pooler, head.

A family adds what differs: its Config's defaults, where positions are looked up, its heads, and the names of its weights.

Dims: B batch, S length, D model width, N heads, H head size, F MLP width, V vocabulary, L layers, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Integer, PRNGKeyArray, PyTree, Shaped

from jaxft.attention import MaskSpec, attend, tokens_last
from jaxft.attention.probabilities import attention_probabilities
from jaxft.data.batch import Field
from jaxft.errors import UserError
from jaxft.layers import (
    ACTIVATIONS,
    Compute,
    Embed,
    FromHeads,
    Initializer,
    LayerNorm,
    Linear,
    Projection,
    apply_stack,
    checked_call,
    dropout,
    project_exactly,
    project_together,
    stacked_params,
    subkey,
    usual_promotion,
)
from jaxft.models.checks import check_fields
from jaxft.models.contract import STARTS, Facts, Features, Head, Output, Stack, head_named, text_inputs
from jaxft.models.heads import answered, first_of_texts, normal

Array = jax.Array


@dataclass(frozen=True)
class EncoderConfig:
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
    """Whether there is a pooler beside the bare encoder; heads that read its vector always have one."""
    num_labels: int = 2

    FIXED: ClassVar[Mapping[str, object]] = {}
    """Fields that are no choice in this family, and what they are."""
    MAY_BE_0: ClassVar[tuple[str, ...]] = ()
    """Sizes that may be 0."""

    def __post_init__(self) -> None:
        for name, value in self.FIXED.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"model.arch: {name}={getattr(self, name)} is not supported: it is {value} in this family"
                )
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        sizes = (*sizes, "max_position_embeddings", "type_vocab_size", "num_labels")
        unchecked = {*self.FIXED, *(name for name in self.MAY_BE_0 if getattr(self, name) == 0)}
        check_fields(self, tuple(name for name in sizes if name not in unchecked), rates, ("hidden_act",))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.arch: hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_attention_heads

    @property
    def stacked_layers(self) -> int:
        """Layers that have parameters of their own."""
        return self.num_hidden_layers

    @property
    def order(self) -> tuple[int, ...]:
        """Which of them runs at each place."""
        return tuple(range(self.num_hidden_layers))

    @property
    def limit(self) -> int:
        """Tokens that a row may have."""
        return self.max_position_embeddings

    @property
    def embedding_width(self) -> int:
        """Width of the tables of tokens, positions and types; what they give is mapped to the model's width where that is another."""
        return self.hidden_size

    @property
    def projects(self) -> bool:
        """Whether that map is there."""
        return self.embedding_width != self.hidden_size

    @property
    def attention_out_dropout(self) -> float:
        """Dropout of what attention adds."""
        return self.hidden_dropout_prob

    @property
    def mlp_out_dropout(self) -> float:
        """Dropout of what an MLP adds."""
        return self.hidden_dropout_prob

    @property
    def position_initial(self) -> Initializer:
        """The initialiser of the table of positions."""
        return normal(self)

    @property
    def class_dropout(self) -> float:
        """Before the classes."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def places(self, tokens: Integer[Array, "B S"], positions: Integer[Array, "B S"] | None) -> Integer[Array, "B S"]:
        """Where each token's position is looked up.

        Args:
          tokens: ids.
          positions: from 0 in each text; None: in each row.
        """
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions

    def pools(self, head: Head) -> bool:
        """Whether a model with that head has a pooler."""
        return head.pooled or (head.make is None and self.pooler)

    def untrained_place(self) -> int | None:
        """The row of the position table that look-ups never train; None: there is none."""
        return None

    def untrained_token(self) -> int | None:
        """The row of the table of tokens that look-ups never train; None: there is none."""
        return self.pad_token_id

    def bias_of_places(self, compute: Compute) -> nn.Module | None:
        """A module that gives, for a length S, what is added to the logits of attention in all layers, [1, N, S, S]; None: nothing is."""
        del compute
        return None


class Attention(nn.Module):
    """Multi-head self-attention with its residual connection and norm."""

    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: MaskSpec,
        key: PRNGKeyArray | None,
        bias: Float[Array, "#B #N S S"] | None = None,
    ) -> Float[Array, "B S D"]:
        c, rules = self.config, self.compute.rules
        d, n, h = c.hidden_size, c.num_attention_heads, c.head_size

        of_weights, of_output = subkey(key, 0), subkey(key, 1)
        drops = key is not None and c.attention_probs_dropout_prob > 0.0
        # Backends that hold tokens on the last axis add no bias.
        last = bias is None and tokens_last((x.shape[0], n, x.shape[1], h), n, mask, self.compute, drops)
        names = ("embed", "heads", None)
        projections = [
            Projection((d, n, h), names, self.compute, normal(c), name=name)() for name in ("query", "key", "value")
        ]
        q, k, v = (
            rules.constrain(y, "batch", "act_heads", "length", None)
            for y in project_together(x, projections, names, self.compute, last)
        )
        mixed = attend(q, k, v, mask, self.compute, c.attention_probs_dropout_prob, of_weights, bias=bias)
        out = FromHeads((n, h, d), ("heads", None, "embed"), self.compute, normal(c), name="out")(mixed, last)
        out = dropout(out, c.attention_out_dropout, of_output, self.compute.dropout_bits)
        return LayerNorm(c.layer_norm_eps, self.compute, name="norm")(x + out)


class Mlp(nn.Module):
    """Two affine maps with an activation between, with residual connection and norm."""

    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        c, rules = self.config, self.compute.rules
        d, f = c.hidden_size, c.intermediate_size
        up = Linear((d, f), ("embed", "mlp"), self.compute, normal(c), name="up")(x)
        up = rules.constrain(up, "batch", "length", "act_mlp")
        act = ACTIVATIONS[c.hidden_act]
        down = Linear((f, d), ("mlp", "embed"), self.compute, normal(c), act=act, name="down")(up)
        down = dropout(down, c.mlp_out_dropout, subkey(key, 0), self.compute.dropout_bits)
        return LayerNorm(c.layer_norm_eps, self.compute, name="norm")(x + down)


class Layer(nn.Module):
    """One encoder layer: post-norm attention, then post-norm MLP."""

    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        key: PRNGKeyArray | None,
        mask: MaskSpec,
        bias: Float[Array, "#B #N S S"] | None = None,
    ) -> Float[Array, "B S D"]:
        x = Attention(self.config, self.compute, name="attention")(x, mask, subkey(key, 0), bias)
        x = Mlp(self.config, self.compute, name="mlp")(x, subkey(key, 1))
        return self.compute.rules.constrain(x, "batch", "length", "act_embed")


class Embeddings(nn.Module):
    """Sum of token, position and token-type vectors, normalised, and mapped to the model's width if theirs is another."""

    config: EncoderConfig
    compute: Compute

    def setup(self) -> None:
        c = self.config

        def table(rows: int, axis: str, initial: Initializer) -> Embed:
            return Embed(rows, c.embedding_width, (axis, "embed"), self.compute, initial)

        self.token = table(c.vocab_size, "vocab", normal(c))
        self.position = table(c.max_position_embeddings, "positions", c.position_initial)
        if c.type_vocab_size:
            self.type = table(c.type_vocab_size, "types", normal(c))
        self.norm = LayerNorm(c.layer_norm_eps, self.compute)
        if c.projects:
            self.project = Linear((c.embedding_width, c.hidden_size), ("embed", "pooled"), self.compute, normal(c))

    def __call__(
        self,
        tokens: Integer[Array, "B S"],
        types: Integer[Array, "B S"] | None,
        positions: Integer[Array, "B S"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B S D"]:
        c, rules, words = self.config, self.compute.rules, self.token(tokens)
        if (unlearnt := c.untrained_token()) is not None:
            frozen = (tokens == unlearnt)[..., None]
            words = jnp.where(frozen, jax.lax.stop_gradient(words), words)
        kinds = self.type(types) if types is not None else None
        places = self.position(positions)
        if (untrained := c.untrained_place()) is not None:
            places = jnp.where((positions == untrained)[..., None], jax.lax.stop_gradient(places), places)
        x = self.norm((words if kinds is None else words + kinds) + places)
        x = rules.constrain(x, "batch", "length", "act_embed")
        x = dropout(x, c.hidden_dropout_prob, key, self.compute.dropout_bits)
        return rules.constrain(self.project(x), "batch", "length", "act_embed") if c.projects else x


class Encoded(NamedTuple):
    """What embeddings and layers give."""

    hidden: Float[Array, "B S D"]
    table: Float[Array, "V E"]
    """The embeddings of tokens."""
    states: Float[Array, "states B S D"] | None
    """What went into the first layer and came out of each; None unless asked for."""
    attentions: Float32[Array, "L B N S S"] | None
    """None unless asked for."""


class EncoderModel(nn.Module):
    """The encoder, with a pooler and head as asked."""

    config: EncoderConfig
    head: str | None = None
    compute: Compute = Compute()

    HEADS: ClassVar[Mapping[str | None, Head]]

    @property
    def facts(self) -> Facts:
        return facts(self.config)

    @nn.compact
    @usual_promotion
    def __call__(
        self,
        tokens: Integer[Array, "B S"],
        mask: Shaped[Array, "B S"] | None = None,
        types: Integer[Array, "B S"] | None = None,
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
          types: token types (0 first text, 1 second). None: all 0.
          positions: of the tokens. None: 0..S-1 in each row.
          segments: for packed rows, 0 is padding; tokens see only their own segment.
          starts: where each text of packed rows begins; vectors and logits of rows are then those of texts.
          predict: positions for the masked-LM head, which sees no others. None: all.
          targets: what stands there; used where ``compute.vocab_tile`` is set.
          key: dropout key; so is ``rngs={"dropout": key}`` of ``apply``. None: deterministic.
          hidden_states: whether to give what went into the first layer and came out of each, too.
          attentions: whether to give the probabilities of attention, before dropout, computed apart from the backend.

        Raises:
          UserError: S is beyond the table, without positions; an argument that there is not, two keys, or a mesh of explicit axes.
        """
        c, (b, s) = self.config, tokens.shape
        typed = "types" in self.facts.inputs
        unknown |= {"types": types} if types is not None and not typed else {}
        key = checked_call(self, tokens, key, unknown, (*self.facts.inputs, "key", "hidden_states", "attentions"))
        head = head_named(type(self).__module__.rpartition(".")[2], self.head, self.HEADS)
        if positions is None and s > c.limit:
            raise UserError(f"sequence length {s} is beyond the model's position table of {c.limit}")
        types = jnp.zeros((b, s), jnp.int32) if types is None and typed else types
        places = c.places(tokens, positions)
        spec = MaskSpec(None if mask is None else mask.astype(bool), segments)
        made = self.encoded(tokens, types, places, spec, key, hidden_states or attentions, attentions)
        hidden, states = made.hidden, made.states if hidden_states else None
        pooled = None
        if c.pools(head):
            dense = Linear((c.hidden_size,) * 2, ("embed", "pooled"), self.compute, normal(c), name="pooler")
            pooled = jnp.tanh(dense(first_of_texts(hidden, starts)))
        of_head = None if head.make is None else head.make(c, self.compute, "head")
        features = Features(hidden, pooled, made.table, targets, starts, mask, segments)
        return answered(of_head, features, subkey(key, 2), predict, states, made.attentions)

    def encoded(
        self,
        tokens: Integer[Array, "B S"],
        types: Integer[Array, "B S"] | None,
        places: Integer[Array, "B S"],
        mask: MaskSpec,
        key: PRNGKeyArray | None,
        keep: bool,
        attentions: bool,
    ) -> Encoded:
        """Embeddings and layers; within :meth:`__call__` only.

        Args:
          keep: whether to give all states. attentions: whether to give probabilities of attention; then ``keep`` is set.
        """
        c = self.config
        embeddings = Embeddings(c, self.compute, name="embed")
        x = embeddings(tokens, types, places, subkey(key, 0))
        of_places = c.bias_of_places(self.compute)
        bias = None if of_places is None else of_places(tokens.shape[1])
        layer, order = Layer(c, self.compute, parent=None), c.order
        layers = stacked_params(self, "layers", layer, c.stacked_layers, x[:1], None, MaskSpec(), bias)
        stack = (layer, layers, len(order), x, subkey(key, 1), mask, bias)
        hidden, states, _ = apply_stack(*stack, keep=keep, order=order)
        looked = _attentions(layers, states, mask, order, bias) if attentions and states is not None else None
        return Encoded(hidden, embeddings.token.embedding, states, looked)


def _attentions(
    layers: PyTree[Array],
    states: Float[Array, "states B S D"],
    mask: MaskSpec,
    order: tuple[int, ...],
    bias: Float[Array, "#B #N S S"] | None,
) -> Float32[Array, "L B N S S"]:
    """How much each token looks at each other one, from the layers' stacked parameters and what went in at each place."""

    def heads(name: str, place: int) -> Array:
        return project_exactly(states[place], layers["attention"][name], order[place])

    places = range(len(order))
    return jnp.stack([attention_probabilities(heads("query", i), heads("key", i), mask, bias) for i in places])


def facts(config: EncoderConfig) -> Facts:
    """What the rest of jaxft may know of an encoder."""
    types = {"types": Field(("batch", "length"), count=config.type_vocab_size)} if config.type_vocab_size else {}
    tokens = (config.vocab_size, config.pad_token_id, config.limit)
    inputs = text_inputs(*tokens, scored="predicted", starts=STARTS, **types)
    heads, key_heads, own = config.num_attention_heads, config.key_heads, config.stacked_layers
    stack = Stack("layers", len(config.order), config.hidden_size, heads, key_heads, config.head_size, stored=own)
    return Facts(inputs, (stack,), config.limit)
