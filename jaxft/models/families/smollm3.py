"""SmolLM3 (Hugging Face 2025), as `transformers` computes it (`SmolLM3Model` and its heads).

A decoder like Llama's, which turns queries and keys in three of four layers alone. SmolLM and SmolLM2 are Llamas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from jaxft.errors import UserError
from jaxft.layers import Rotary
from jaxft.models import decoder, decoder_files
from jaxft.models.causal import LayerKind
from jaxft.models.contract import Head
from jaxft.models.layer_types import GLOBAL, LOCAL
from jaxft.models.layout import Layout

MODEL_TYPES = {"smollm3": "SmolLM3"}


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    rope: Rotary = field(default_factory=lambda: Rotary(2_000_000.0))
    pad_token_id: int | None = 128004
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    no_rope_layers: tuple[int, ...] | None = None
    """For each layer 1 if queries and keys are turned, 0 if not; None: ``no_rope_layer_interval`` says."""
    no_rope_layer_interval: int = 4
    """Layers of a period, of which the last turns no queries and keys."""
    sliding_window: int | None = None
    """A token of a local layer sees itself and so many less one before it; None: all layers are global. In config.json,
    ``use_sliding_window`` turns windows on."""
    layer_types: tuple[str, ...] | None = None
    """``full_attention`` or ``sliding_attention``, for each layer; None: layers that turn nothing are local, if any are."""

    SIZES: ClassVar[tuple[str, ...]] = ("sliding_window", "no_rope_layer_interval")

    def __post_init__(self) -> None:
        super().__post_init__()
        decoder_files.check_types(self, self.layer_types)
        turned = self.no_rope_layers
        if turned is not None and (len(turned) < self.num_hidden_layers or not set(turned) <= {0, 1}):
            raise UserError(
                f"model.arch: no_rope_layers={list(turned)} must be 0 or 1 for each of {self.num_hidden_layers} layers"
            )

    @property
    def turned(self) -> tuple[int, ...]:
        """Whether each layer turns queries and keys."""
        stated, count = self.no_rope_layers, self.num_hidden_layers
        return (
            stated[:count] if stated else tuple(int((i + 1) % self.no_rope_layer_interval != 0) for i in range(count))
        )

    @property
    def types(self) -> tuple[str, ...]:
        """The type of each layer: global or local."""
        local = self.sliding_window is not None
        return self.layer_types or tuple(LOCAL if local and not turned else GLOBAL for turned in self.turned)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What is static and differs by layer, for each one."""
        return tuple(
            LayerKind(self.rope if turned else None, self.sliding_window if name == LOCAL else None)
            for turned, name in zip(self.turned, self.types, strict=True)
        )

    @property
    def head_biases(self) -> bool:
        """Whether the maps of attention have biases."""
        return self.attention_bias

    @property
    def mlp_biases(self) -> bool:
        """Whether the maps of the MLP have biases."""
        return self.mlp_bias


TINY = Config(**decoder.SMALL, pad_token_id=0, no_rope_layer_interval=2)

HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "token_classification": decoder_files.TOKEN_CLASSIFICATION,
    "classification": decoder_files.CLASSIFICATION,
    "question_answering": decoder_files.ANSWERS,
    "causal_lm": decoder_files.CAUSAL_LM,
}


class Model(decoder.DecoderModel):
    """The decoder, with a head as asked."""

    HEADS = HEADS


facts, SUPERSEDED, config_of_weights = decoder.facts, decoder_files.SUPERSEDED, decoder_files.config_of_weights

_OWN = ("sliding_window", "layer_types", "no_rope_layers")


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states.

    Raises:
      UserError: rotary positions or types of layers that are not supported.
    """
    own = decoder_files.types_and_window(hf, Config.num_hidden_layers, None)
    if hf.get("no_rope_layers") is not None:
        own["no_rope_layers"] = hf["no_rope_layers"]
    return {**decoder_files.config_from_hf(Config, hf, _OWN), **own}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    windows = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    by_layer = {"layer_types": list(config.types), "no_rope_layers": list(config.turned)}
    return {**decoder_files.config_to_hf(config, _OWN), **windows, **by_layer}


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return decoder_files.hf_layout(config, head, HEADS, answers_at="transformer")
