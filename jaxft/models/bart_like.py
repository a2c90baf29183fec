"""The encoder-decoder of BART (Lewis et al. 2019) and of the families that kept it: biased maps, layer norms behind what a layer adds or
before it, learned or sinusoidal positions, one table of tokens, and a bias of the vocabulary that is never trained.

A family adds what differs: fields of its Config and what follows from them, its heads' names, and what its config.json may not say.

Dims: B batch, S source length, T target length, D model width, N heads, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer, PRNGKeyArray

from jaxft.attention import MaskSpec
from jaxft.errors import UserError
from jaxft.layers import ACTIVATIONS, Compute, Embed, LayerNorm, Linear, dropout, subkey
from jaxft.models import encoder_decoder
from jaxft.models.checks import check_fields
from jaxft.models.cross_attention import Attention
from jaxft.models.encoder_decoder import State
from jaxft.models.heads import Vocabulary, normal

Array = jax.Array

EPS = 1e-5
"""What the reference's layer norms add to variances; no config.json says so."""
OFFSET = 2
"""Rows of a table of learned positions before that of position 0."""

facts = encoder_decoder.facts


@dataclass(frozen=True)
class BartLikeConfig:
    """Everything that changes the maths. Field names are those of other families; config.json has others (``bart_like_files.NAMES``)."""

    vocab_size: int = 50265
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    """Layers of the encoder."""
    num_decoder_layers: int = 12
    num_attention_heads: int = 16
    """Heads of the encoder's layers."""
    num_decoder_heads: int = 16
    intermediate_size: int = 4096
    """Width of the encoder's MLPs."""
    decoder_intermediate_size: int = 4096
    hidden_act: str = "gelu"
    max_position_embeddings: int = 1024
    hidden_dropout: float = 0.1
    """Dropout of embeddings, and of what attention and MLP add."""
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_layerdrop: float = 0.0
    """How often a layer is left out of a training step (Fan et al. 2019)."""
    decoder_layerdrop: float = 0.0
    initializer_range: float = 0.02
    scale_embedding: bool = False
    """Embeddings of tokens are multiplied with the square root of their width."""
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    """Its embedding is never trained through look-ups, as with torch's ``padding_idx``."""
    decoder_start_token_id: int = 2
    """What every target begins with."""

    EMBEDDING_NORMS: ClassVar[bool] = True
    """What goes into the first layer of a side is normalised."""
    KEY_BIASES: ClassVar[bool] = True
    """Maps to keys have a bias, as those to queries and values."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_decoder_layers", "num_attention_heads")
        sizes = (*sizes, "num_decoder_heads", "intermediate_size", "decoder_intermediate_size")
        rates = ("hidden_dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
        check_fields(self, (*sizes, "max_position_embeddings"), rates, ("hidden_act",))
        for name in ("num_attention_heads", "num_decoder_heads"):
            if self.hidden_size % getattr(self, name):
                raise UserError(
                    f"model.arch: hidden_size={self.hidden_size} is not a multiple of {name}={getattr(self, name)}"
                )
        if not 0 <= self.decoder_start_token_id < self.vocab_size:
            raise UserError(
                f"model.arch: decoder_start_token_id={self.decoder_start_token_id} is not among {self.vocab_size} tokens"
            )

    @property
    def pre_norms(self) -> bool:
        """Whether what goes into attention and MLP is normalised, and what comes out of the last layer; not what layers give."""
        return False

    @property
    def decoder_heads(self) -> int:
        """Heads of the decoder's layers."""
        return self.num_decoder_heads

    @property
    def head_size(self) -> int:
        """Width of a head of the encoder's."""
        return self.hidden_size // self.num_attention_heads

    @property
    def decoder_head_size(self) -> int:
        """Width of a head of the decoder's."""
        return self.hidden_size // self.num_decoder_heads

    @property
    def limit(self) -> int | None:
        """Tokens that a row may have."""
        return self.max_position_embeddings


C = TypeVar("C", bound=BartLikeConfig)


class Layer(nn.Module):
    """A layer of either side: attention of tokens to each other, in a decoder to the source, then the MLP; a norm before or behind each."""

    config: BartLikeConfig
    compute: Compute
    side: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        key: PRNGKeyArray | None,
        mask: MaskSpec,
        bias: Float[Array, "1 N S _"] | None,
        memory: Float[Array, "R _ D"] | None = None,
        source: MaskSpec | None = None,
        state: State | None = None,
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], State]:
        """The next layer's input; with ``state``, keys and values of these tokens, and of the source if they are new, too."""
        c, how, before = self.config, self.compute, x

        def norm(name: str, x: Array, here: bool) -> Array:
            return LayerNorm(EPS, how, name=name)(x) if here else x

        def added(name: str, x: Array, more: Array, number: int) -> Array:
            x = x + dropout(more, c.hidden_dropout, subkey(key, number), how.dropout_bits)
            return norm(name, x, not c.pre_norms)

        past = None if state is None else (state[0], state[1])
        seen = norm("norm", x, c.pre_norms)
        mixed, new = self._attention("attention")(seen, mask, subkey(key, 0), bias, past=past)
        x = added("norm", x, mixed, 1)
        of_source: tuple[Array | None, Array | None] = (None, None)
        if source is not None:
            known = None if state is None or state[2] is None or state[3] is None else (state[2], state[3])
            seen, read_from = norm("cross_norm", x, c.pre_norms), memory if known is None else known
            mixed, read = self._attention("cross")(seen, source, subkey(key, 2), memory=read_from)
            x, of_source = added("cross_norm", x, mixed, 3), read if known is None else of_source
        x = added("mlp_norm", x, self._mlp(norm("mlp_norm", x, c.pre_norms), subkey(key, 4)), 5)
        rate = c.encoder_layerdrop if self.side == "encoder" else c.decoder_layerdrop
        if key is not None and rate > 0.0:
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 6), rate), before, x)
        x = how.rules.constrain(x, "batch", "length" if source is None else "target", "act_embed")
        return x if state is None else (x, (new[0], new[1], of_source[0], of_source[1]))

    def _attention(self, name: str) -> Attention:
        c, initial = self.config, normal(self.config)
        encodes = self.side == "encoder"
        heads, size = (c.num_attention_heads, c.head_size) if encodes else (c.decoder_heads, c.decoder_head_size)
        how = (self.compute, initial, initial, initial, c.attention_dropout)
        return Attention(heads, size, *how, biased=True, key_biased=c.KEY_BIASES, name=name)

    def _mlp(self, x: Float[Array, "B S D"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        c, how, d = self.config, self.compute, self.config.hidden_size
        f = c.intermediate_size if self.side == "encoder" else c.decoder_intermediate_size
        wide = Linear((d, f), ("embed", "mlp"), how, normal(c), name="up")(x)
        wide = how.rules.constrain(wide, "batch", "length", "act_mlp")
        act = ACTIVATIONS[c.hidden_act]
        # Without dropout, the activation is made again in the backward pass.
        drops = key is not None and c.activation_dropout > 0.0
        inner = dropout(act(wide), c.activation_dropout, key, how.dropout_bits) if drops else wide
        return Linear((f, d), ("mlp", "embed"), how, normal(c), None if drops else act, name="down")(inner)


class BartLikeModel(encoder_decoder.EncoderDecoder[C], Generic[C]):
    """The encoder-decoder, with a head as asked."""

    def table(self) -> Embed:
        c = self.config
        return Embed(c.vocab_size, c.hidden_size, ("vocab", "embed"), self.compute, normal(c), name="embed")

    def placed(self, side: str, positions: Integer[Array, "B S"]) -> Float[Array, "B S D"]:
        """What is added to embeddings of tokens at positions of a side."""
        c, names = self.config, ("positions", "embed")
        rows = c.max_position_embeddings + OFFSET
        table = Embed(rows, c.hidden_size, names, self.compute, normal(c), name=f"{side}_positions")
        return table(positions + OFFSET)

    def embedded(
        self,
        table: Embed,
        side: str,
        tokens: Integer[Array, "B S"],
        positions: Integer[Array, "B S"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B S D"]:
        c, length = self.config, "length" if side == "encoder" else "target"
        x = table(tokens)
        if c.pad_token_id is not None:
            x = jnp.where((tokens == c.pad_token_id)[..., None], jax.lax.stop_gradient(x), x)
        x = x * math.sqrt(c.hidden_size) if c.scale_embedding else x
        x = self.compute.rules.constrain(x + self.placed(side, positions), "batch", length, "act_embed")
        if c.EMBEDDING_NORMS:
            x = LayerNorm(EPS, self.compute, name=f"{side}_embed_norm")(x)
        return dropout(x, c.hidden_dropout, key, self.compute.dropout_bits)

    def layer(self, side: str) -> nn.Module:
        return Layer(self.config, self.compute, side, parent=None)

    def normed(self, side: str, x: Float[Array, "B S D"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        del key
        return LayerNorm(EPS, self.compute, name=f"{side}_norm")(x) if self.config.pre_norms else x


def vocabulary(config: BartLikeConfig, compute: Compute, name: str, fixed_bias: bool = True) -> Vocabulary:
    """The head of texts."""
    c, tied = config, config.tie_word_embeddings
    sizes = (c.hidden_size, c.vocab_size, tied)
    return Vocabulary(*sizes, compute, normal(c), fixed_bias=fixed_bias, axis="target", name=name)
