"""M2M-100 (Fan et al. 2020) and NLLB (NLLB Team et al. 2022), translators between any two of their languages, as `transformers` computes
them (`M2M100Model`, `M2M100ForConditionalGeneration`).

mBART's encoder-decoder with sinusoidal positions, and without norms of what goes into the first layers.

Dims: B batch, S length, D model width, P positions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Integer

from jaxft.errors import UserError
from jaxft.layers.embedding import look_up
from jaxft.models import bart_like, bart_like_files
from jaxft.models.bart_like import BartLikeConfig, vocabulary
from jaxft.models.contract import Head
from jaxft.models.encoder_decoder import SEQ2SEQ_LM
from jaxft.models.layout import Layout, Rule

Array = jax.Array

MODEL_TYPES = {"m2m_100": "M2M100"}


@dataclass(frozen=True)
class Config(BartLikeConfig):
    """Everything that changes the maths."""

    vocab_size: int = 128112
    hidden_act: str = "relu"
    attention_dropout: float = 0.1
    encoder_layerdrop: float = 0.05
    decoder_layerdrop: float = 0.05
    scale_embedding: bool = True

    EMBEDDING_NORMS: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id is None or self.pad_token_id < 0:
            raise UserError(
                f"model.arch: pad_token_id={self.pad_token_id}: positions are counted from it; give its number"
            )
        if self.pad_token_id == self.decoder_start_token_id:
            raise UserError(
                f"model.arch: decoder_start_token_id={self.decoder_start_token_id} is pad_token_id, too: padding has no position, and "
                "targets begin with one; give one of them another number"
            )

    @property
    def pre_norms(self) -> bool:
        return True

    @property
    def first_position(self) -> int:
        """The row of the table of positions that a text begins with."""
        return (self.pad_token_id or 0) + 1


TINY = Config(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_decoder_layers=3, num_attention_heads=4, num_decoder_heads=2,
    intermediate_size=64, decoder_intermediate_size=48, max_position_embeddings=64, initializer_range=0.1,
    activation_dropout=0.1, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
)  # fmt: skip


def _head_rules(config: Config) -> tuple[Rule, ...]:
    return () if config.tie_word_embeddings else (Rule("head/kernel", bart_like_files.HEAD_TABLE, "v d -> d v"),)


HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    SEQ2SEQ_LM: Head("ForConditionalGeneration", functools.partial(vocabulary, fixed_bias=False), _head_rules),
}


@functools.lru_cache(maxsize=4)
def sinusoids(places: int, width: int) -> Float32[np.ndarray, "P D"]:
    """Sines, then cosines, of each position, at wavelengths that grow geometrically up to 10,000 (as in tensor2tensor)."""
    half = width // 2
    steps = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / max(half - 1, 1)))
    angles = np.arange(places, dtype=np.float32)[:, None] * steps
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, width % 2)))


class Model(bart_like.BartLikeModel[Config]):
    """The encoder-decoder, with a head as asked."""

    HEADS = HEADS

    def placed(self, side: str, positions: Integer[Array, "B S"]) -> Float[Array, "B S D"]:
        del side
        c, names = self.config, ("positions", "embed")
        table = jnp.asarray(sinusoids(c.max_position_embeddings + c.first_position, c.hidden_size))
        return look_up(table, positions + c.first_position, names, self.compute)


facts = bart_like.facts

# ------------------------------------------------------------------------------------------------ Hugging Face layout

SUPERSEDED = bart_like_files.SUPERSEDED
config_of_weights = bart_like_files.config_of_weights
config_to_hf = bart_like_files.config_to_hf
_ALWAYS = {"normalize_before": True, "add_final_layer_norm": True, "normalize_embedding": False}


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: what :func:`jaxft.models.bart_like_files.config_from_hf` refuses.
    """
    return bart_like_files.config_from_hf(Config, hf, _ALWAYS)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return bart_like_files.hf_layout(config, HEADS[head].rules(config), learned_positions=False)
