"""Mistral (Jiang et al. 2023), as `transformers` computes it (`MistralModel` and its heads).

A decoder like Llama's, whose layers all have the same sliding window, if any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxft.errors import UserError
from jaxft.models import decoder, decoder_files
from jaxft.models.causal import LayerKind
from jaxft.models.contract import Head
from jaxft.models.layer_types import GLOBAL, LOCAL
from jaxft.models.layout import Layout

MODEL_TYPES = {"mistral": "Mistral"}


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    head_dim: int | None = None
    """None: ``hidden_size / num_attention_heads``."""
    sliding_window: int | None = 4096
    """A token sees itself and so many less one before it; None: all."""

    SIZES: ClassVar[tuple[str, ...]] = ("head_dim", "sliding_window")

    @property
    def own_head_size(self) -> int | None:
        """The head size, where it is stated."""
        return self.head_dim

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What is static and differs by layer, for each one: here, nothing does."""
        return (LayerKind(self.rope, self.sliding_window),) * self.num_hidden_layers


TINY = Config(**decoder.SMALL, sliding_window=8)

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


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states.

    Raises:
      UserError: rotary positions that are not supported, or types of layers, which the reference does not have here.
    """
    found = decoder_files.config_from_hf(Config, hf)
    alike = GLOBAL if found.get("sliding_window", Config.sliding_window) is None else LOCAL
    types = hf.get("layer_types")
    if types is not None and (not isinstance(types, list) or set(types) != {alike}):
        raise UserError(
            f"config.json: layer_types are not supported here: with this sliding_window, all layers are of {alike}"
        )
    return found


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return {**decoder_files.config_to_hf(config), "head_dim": config.head_size}


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return decoder_files.hf_layout(config, head, HEADS)
