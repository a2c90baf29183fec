"""Llama (Touvron et al. 2023), as `transformers` computes it (`LlamaModel`, `LlamaForCausalLM`, and its classes for texts, tokens and
answers). SmolLM2 is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxft.models import decoder, decoder_files
from jaxft.models.contract import Head
from jaxft.models.layout import Layout

MODEL_TYPES = {"llama": "Llama"}


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    head_dim: int | None = None
    """None: ``hidden_size / num_attention_heads``."""
    attention_bias: bool = False
    mlp_bias: bool = False

    SIZES: ClassVar[tuple[str, ...]] = ("head_dim",)

    @property
    def own_head_size(self) -> int | None:
        """The head size, where it is stated."""
        return self.head_dim

    @property
    def head_biases(self) -> bool:
        """Whether the maps of attention have biases."""
        return self.attention_bias

    @property
    def mlp_biases(self) -> bool:
        """Whether the maps of the MLP have biases."""
        return self.mlp_bias


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


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states."""
    return decoder_files.config_from_hf(Config, hf)


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return {**decoder_files.config_to_hf(config), "head_dim": config.head_size}


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return decoder_files.hf_layout(config, head, HEADS, answers_at="transformer")
