"""The decoder of Llama (Touvron et al. 2023) and of the families that kept it: RMS norms, rotary positions, grouped heads, gated MLPs.

A family adds what differs: fields of its Config and what follows from them, its heads, and the names of its weights.

Dims: B batch, S length, D model width, N query heads, K key/value heads, H head size, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Integer, PRNGKeyArray, PyTree

from jaxft.attention import MaskSpec
from jaxft.attention.probabilities import attention_probabilities
from jaxft.errors import UserError
from jaxft.layers import Compute, Embed, RMSNorm, Rotary, project_exactly, rms_norm, rotate
from jaxft.models import causal
from jaxft.models.blocks import GatedMlp, KeysAndValues, QueryKeyNorm, RotaryAttention
from jaxft.models.causal import LayerKind
from jaxft.models.checks import check_fields
from jaxft.models.heads import normal

Array = jax.Array

facts = causal.facts


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    """None: as many as query heads."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope: Rotary = field(default_factory=Rotary)
    attention_dropout: float = 0.0
    pad_token_id: int | None = None
    """Its embedding is never trained through look-ups, as with torch's ``padding_idx``."""
    tie_word_embeddings: bool = False
    num_labels: int = 2
    classifier_dropout: float | None = None
    """Dropout before tokens are classified. None: 0.1, as the reference has it."""

    SIZES: ClassVar[tuple[str, ...]] = ()
    """Further fields that must be 1 or more."""
    PRE_NORMS: ClassVar[bool] = True
    """What goes into attention and MLP is normalised."""
    POST_NORMS: ClassVar[bool] = False
    """What comes out of them is, before it is added."""
    ZERO_CENTRED: ClassVar[bool] = False
    """The same in :class:`~jaxft.layers.RMSNorm`."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes = (*sizes, "max_position_embeddings", "num_key_value_heads", "num_labels", *self.SIZES)
        check_fields(self, sizes, ("attention_dropout", "classifier_dropout"), ("hidden_act",))
        if self.num_attention_heads % self.key_heads:
            raise UserError(
                f"model.arch: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.key_heads}"
            )
        if self.own_head_size is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.arch: hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise UserError(f"model.arch: the head size {self.head_size} must be even for rotary positions")

    @property
    def class_dropout(self) -> float:
        return 0.1 if self.classifier_dropout is None else self.classifier_dropout

    @property
    def own_head_size(self) -> int | None:
        """The head size, where the family has a field of it; None: ``hidden_size / num_attention_heads``."""
        return None

    @property
    def head_size(self) -> int:
        return self.own_head_size or self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What is static and differs by layer, for each one."""
        return (LayerKind(self.rope),) * self.num_hidden_layers

    @property
    def head_biases(self) -> bool:
        """Whether the maps to queries, keys and values have biases."""
        return False

    @property
    def out_bias(self) -> bool:
        """Whether the map from heads back to the width has one."""
        return self.head_biases

    @property
    def mlp_biases(self) -> bool:
        """Whether the maps of the MLP have biases."""
        return False

    @property
    def query_key_norm(self) -> QueryKeyNorm | None:
        """Norms of queries and keys."""
        return None

    @property
    def attention_scale(self) -> float | None:
        """What products of queries and keys are multiplied with; None: 1 / sqrt(head size)."""
        return None

    @property
    def attention_cap(self) -> float | None:
        """Products l of queries and keys become cap tanh(l / cap); None: they stay."""
        return None

    @property
    def logit_cap(self) -> float | None:
        """The same of the logits of the vocabulary."""
        return None

    @property
    def embedding_scale(self) -> float | None:
        """What the vectors of tokens are multiplied with; None: they stay."""
        return None


class Sizes(TypedDict):
    """Some fields of a Config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    attention_dropout: float
    initializer_range: float


SMALL: Sizes = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "initializer_range": 0.1,
}
"""A model that tests can afford."""


class Layer(nn.Module):
    """One decoder layer: attention, then the MLP, each between the norms that the family has."""

    config: DecoderConfig
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
        c, start = self.config, normal(self.config)

        def norm(there: bool, name: str, x: Array) -> Array:
            return RMSNorm(c.rms_norm_eps, self.compute, c.ZERO_CENTRED, name=name)(x) if there else x

        sizes = (c.num_attention_heads, c.key_heads, c.head_size)
        attention = RotaryAttention(
            *sizes, self.compute, start, start, c.attention_dropout, c.head_biases, out_biased=c.out_bias,
            norm=c.query_key_norm, scale=c.attention_scale, soft_cap=c.attention_cap, name="attention",
        )  # fmt: skip
        near = kind.mask(mask, x.shape[1] if state is None else state[0].shape[2])
        mixed, new = attention(norm(c.PRE_NORMS, "norm", x), near, positions, key, kind.rope, state)
        x = x + norm(c.POST_NORMS, "attention_out_norm", mixed)
        mlp = GatedMlp(c.intermediate_size, c.hidden_act, self.compute, start, start, c.mlp_biases, name="mlp")
        x = x + norm(c.POST_NORMS, "mlp_out_norm", mlp(norm(c.PRE_NORMS, "mlp_norm", x)))
        x = self.compute.rules.constrain(x, "batch", "length", "act_embed")
        return x if state is None else (x, new)


class DecoderModel(causal.CausalModel[DecoderConfig]):
    """The decoder, with a head as asked."""

    def embedded(
        self, tokens: Integer[Array, "B S"], positions: Integer[Array, "B S"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "V D"]]:
        del positions, key  # layers know of positions; nothing is dropped
        c = self.config
        embed = Embed(c.vocab_size, c.hidden_size, ("vocab", "embed"), self.compute, normal(c), name="embed")
        x = embed(tokens)
        if c.pad_token_id is not None:
            x = jnp.where((tokens == c.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        return self.compute.rules.constrain(x, "batch", "length", "act_embed"), embed.embedding

    def layer(self) -> nn.Module:
        return Layer(self.config, self.compute, parent=None)

    def normed(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        c = self.config
        return RMSNorm(c.rms_norm_eps, self.compute, c.ZERO_CENTRED, name="norm")(x)

    def looked(
        self,
        layers: PyTree[Array],
        number: int,
        x: Float32[Array, "B S D"],
        mask: MaskSpec,
        positions: Integer[Array, "B S"],
        kind: LayerKind,
    ) -> Float32[Array, "B N S S"]:
        c = self.config

        def norm(tree: PyTree[Array], y: Array) -> Array:
            return rms_norm(y, tree["scale"][number] + 1.0 * c.ZERO_CENTRED, c.rms_norm_eps)

        def heads(name: str) -> Array:
            y = project_exactly(seen, layers["attention"][name], number)
            if (of_heads := c.query_key_norm) is not None:
                flat = y.transpose(0, 2, 1, 3)  # [B, S, N, H]
                merged = flat.reshape(*flat.shape[:2], -1) if of_heads.whole else flat
                y = norm(layers["attention"][f"{name}_norm"], merged).reshape(flat.shape).transpose(0, 2, 1, 3)
            return y if kind.rope is None else rotate(y, positions, kind.rope)

        seen = norm(layers["norm"], x) if c.PRE_NORMS else x
        near = kind.mask(mask, x.shape[1])
        return attention_probabilities(
            heads("query"), heads("key"), near, scale=c.attention_scale, soft_cap=c.attention_cap
        )
