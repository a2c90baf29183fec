"""Qwen2 and Qwen2.5 (Yang et al. 2024), as `transformers` computes them (`Qwen2Model` and its heads).

A decoder like Llama's, whose queries, keys and values have biases; the last layers may have sliding windows.
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

MODEL_TYPES = {"qwen2": "Qwen2"}


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    sliding_window: int | None = None
    """A token of a local layer sees itself and so many less one before it; None: all layers are global. In config.json,
    ``use_sliding_window`` turns windows on."""
    max_window_layers: int = 28
    """The layers from this one on are local, if any are and ``layer_types`` does not say."""
    layer_types: tuple[str, ...] | None = None
    """``full_attention`` or ``sliding_attention``, for each layer."""

    SIZES: ClassVar[tuple[str, ...]] = ("sliding_window",)

    def __post_init__(self) -> None:
        super().__post_init__()
        decoder_files.check_types(self, self.layer_types)

    @property
    def head_biases(self) -> bool:
        """They always have."""
        return True

    @property
    def out_bias(self) -> bool:
        """It never has."""
        return False

    @property
    def types(self) -> tuple[str, ...]:
        """The type of each layer: global or local."""
        begins = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
        return self.layer_types or tuple(LOCAL if i >= begins else GLOBAL for i in range(self.num_hidden_layers))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What is static and differs by layer, for each one."""
        return tuple(LayerKind(self.rope, self.sliding_window if name == LOCAL else None) for name in self.types)


TINY = Config(**decoder.SMALL)

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

_OWN = ("sliding_window", "layer_types")


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states.

    Raises:
      UserError: rotary positions or types of layers that are not supported.
    """
    types = decoder_files.types_and_window(hf, Config.num_hidden_layers, 4096)
    return {**decoder_files.config_from_hf(Config, hf, _OWN), **types}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    windows = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    return {**decoder_files.config_to_hf(config, _OWN), **windows, "layer_types": list(config.types)}


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return decoder_files.hf_layout(config, head, HEADS, answers_at="transformer")
