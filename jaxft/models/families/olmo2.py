"""OLMo 2 (OLMo team 2024), as `transformers` computes it (`Olmo2Model`, `Olmo2ForCausalLM`, and its class for texts).

A decoder like Llama's, which normalises what comes out of attention and MLP instead of what goes in, and queries and keys of all heads
together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxft.models import decoder, decoder_files
from jaxft.models.blocks import QueryKeyNorm
from jaxft.models.contract import Head
from jaxft.models.layout import Layout

MODEL_TYPES = {"olmo2": "Olmo2"}


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    attention_bias: bool = False

    PRE_NORMS: ClassVar[bool] = False
    POST_NORMS: ClassVar[bool] = True

    @property
    def head_biases(self) -> bool:
        """Whether the maps of attention have biases."""
        return self.attention_bias

    @property
    def query_key_norm(self) -> QueryKeyNorm | None:
        """Over all heads together."""
        return QueryKeyNorm(self.rms_norm_eps, whole=True)


TINY = Config(**decoder.SMALL)

HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "classification": decoder_files.CLASSIFICATION,
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
    return decoder_files.config_to_hf(config)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return decoder_files.hf_layout(config, head, HEADS)
