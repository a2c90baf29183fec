"""Gemma 2 (Gemma team 2024), as `transformers` computes it (`Gemma2Model` and its heads).

A decoder like Llama's, with norms before and behind attention and MLP, soft caps of logits, scaled embeddings, and a sliding window in
every other layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxft.models import decoder, decoder_files
from jaxft.models.causal import LayerKind
from jaxft.models.contract import Head
from jaxft.models.layer_types import GLOBAL, LOCAL
from jaxft.models.layout import Layout

MODEL_TYPES = {"gemma2": "Gemma2"}


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    max_position_embeddings: int = 8192
    num_key_value_heads: int | None = 4
    hidden_act: str = "gelu_pytorch_tanh"
    """``hidden_activation`` in config.json."""
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    head_dim: int = 256
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    """Products of queries and keys are divided by its square root."""
    sliding_window: int = 4096
    """A token of a local layer sees itself and so many less one before it."""
    layer_types: tuple[str, ...] | None = None
    """``full_attention`` or ``sliding_attention``, for each layer; None: 0, 2, 4, ... are local."""
    final_logit_softcapping: float | None = 30.0
    """Logits l of the vocabulary become cap tanh(l / cap); None: they stay."""
    attn_logit_softcapping: float | None = 50.0
    """The same of products of queries and keys."""

    SIZES: ClassVar[tuple[str, ...]] = ("head_dim", "sliding_window", "query_pre_attn_scalar")
    POST_NORMS: ClassVar[bool] = True
    ZERO_CENTRED: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        decoder_files.check_types(self, self.layer_types)
        decoder_files.check_caps(self, ("final_logit_softcapping", "attn_logit_softcapping"))

    @property
    def types(self) -> tuple[str, ...]:
        """The type of each layer: global or local."""
        return self.layer_types or tuple(GLOBAL if i % 2 else LOCAL for i in range(self.num_hidden_layers))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What is static and differs by layer, for each one."""
        return tuple(LayerKind(self.rope, self.sliding_window if name == LOCAL else None) for name in self.types)

    @property
    def attention_cap(self) -> float | None:
        """Products l of queries and keys become cap tanh(l / cap)."""
        return self.attn_logit_softcapping

    @property
    def own_head_size(self) -> int | None:
        """It is always stated."""
        return self.head_dim

    @property
    def head_biases(self) -> bool:
        """Whether the maps of attention have biases."""
        return self.attention_bias

    @property
    def attention_scale(self) -> float | None:
        """What products of queries and keys are multiplied with."""
        return self.query_pre_attn_scalar**-0.5

    @property
    def logit_cap(self) -> float | None:
        """Logits l of the vocabulary become cap tanh(l / cap)."""
        return self.final_logit_softcapping

    @property
    def embedding_scale(self) -> float | None:
        """What the vectors of tokens are multiplied with."""
        return self.hidden_size**0.5


TINY = Config(
    **decoder.SMALL, head_dim=12, query_pre_attn_scalar=10, sliding_window=8, final_logit_softcapping=3.0,
    attn_logit_softcapping=2.0,
)  # fmt: skip

HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "token_classification": decoder_files.TOKEN_CLASSIFICATION,
    "classification": decoder_files.CLASSIFICATION,
    "causal_lm": decoder_files.CAUSAL_LM,
}


class Model(decoder.DecoderModel):
    """The decoder, with a head as asked."""

    HEADS = HEADS


facts, SUPERSEDED, config_of_weights = decoder.facts, decoder_files.SUPERSEDED, decoder_files.config_of_weights

_OWN = ("hidden_act", "layer_types")


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states.

    Raises:
      UserError: rotary positions or types of layers that are not supported, or tokens that see those behind them.
    """
    own = decoder_files.gemma_from_hf(hf, Config.num_hidden_layers)
    return {**decoder_files.config_from_hf(Config, hf, _OWN), **own}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    own = {"hidden_activation": config.hidden_act, "layer_types": list(config.types)}
    return {**decoder_files.config_to_hf(config, _OWN), **own}


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return decoder_files.hf_layout(config, head, HEADS)
