"""Marian's translators (Junczys-Dowmunt et al. 2018; the models of OPUS-MT, Tiedemann & Thottingal 2020), as `transformers` computes them
(`MarianModel`, `MarianMTModel`).

BART's encoder-decoder with sinusoidal positions, and without norms of what goes into the first layers.

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
from jaxft.models.layout import Layout, Tensors

Array = jax.Array

MODEL_TYPES = {"marian": "Marian"}


@dataclass(frozen=True)
class Config(BartLikeConfig):
    """Everything that changes the maths."""

    vocab_size: int = 58101
    pad_token_id: int | None = 58100
    decoder_start_token_id: int = 58100

    EMBEDDING_NORMS: ClassVar[bool] = False


TINY = Config(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_decoder_layers=3, num_attention_heads=4, num_decoder_heads=2,
    intermediate_size=64, decoder_intermediate_size=48, max_position_embeddings=64, initializer_range=0.1, scale_embedding=True,
    hidden_act="swish", attention_dropout=0.1, activation_dropout=0.1, pad_token_id=0, decoder_start_token_id=0,
)  # fmt: skip

HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    SEQ2SEQ_LM: Head("MTModel", vocabulary, bart_like_files.head_rules, marks=("final_logits_bias",)),
}


@functools.lru_cache(maxsize=4)
def sinusoids(places: int, width: int) -> Float32[np.ndarray, "P D"]:
    """Sines, then cosines, of each position, at wavelengths that grow geometrically (Vaswani et al. 2017)."""
    angles = np.arange(places)[:, None] / np.power(10000.0, 2 * (np.arange(width) // 2) / width)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)


class Model(bart_like.BartLikeModel[Config]):
    """The encoder-decoder, with a head as asked."""

    HEADS = HEADS

    def placed(self, side: str, positions: Integer[Array, "B S"]) -> Float[Array, "B S D"]:
        del side
        table = jnp.asarray(sinusoids(self.config.max_position_embeddings, self.config.hidden_size))
        return look_up(table, positions, ("positions", "embed"), self.compute)


facts = bart_like.facts

# ------------------------------------------------------------------------------------------------ Hugging Face layout

SUPERSEDED = bart_like_files.SUPERSEDED
_ALWAYS = {
    "normalize_before": False,
    "add_final_layer_norm": False,
    "normalize_embedding": False,
    "static_position_embeddings": True,
}
config_to_hf = bart_like_files.config_to_hf


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: sides with tables of their own, or what :func:`jaxft.models.bart_like_files.config_from_hf` refuses.
    """
    if hf.get("share_encoder_decoder_embeddings") is False:
        raise UserError(
            "config.json: share_encoder_decoder_embeddings=false is not supported: both sides have one table of tokens here"
        )
    return bart_like_files.config_from_hf(Config, hf, _ALWAYS)


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json.

    Raises:
      UserError: the two sides have tables of tokens that differ, or a table of positions is none of sinusoids.
    """
    for name in weights.names():
        if not name.endswith("embed_positions.weight") or len(weights.shape(name)) != 2:
            continue
        places, width = weights.shape(name)
        if not np.allclose(weights.read(name).astype(np.float32), sinusoids(places, width), rtol=0, atol=2e-3):
            raise UserError(f"{name}: is not the table of sinusoids that this family computes, and would not be read")
    return bart_like_files.config_of_weights(weights)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return bart_like_files.hf_layout(config, HEADS[head].rules(config), learned_positions=False)
