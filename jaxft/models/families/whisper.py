"""Whisper (Radford et al. 2022), as `transformers` computes it (`WhisperModel`, `WhisperForConditionalGeneration`).

BART's encoder-decoder with norms before what they are behind in BART, and without biases of keys. The encoder reads frames of sound, two
convolutions make one vector of two of them, and its positions are sinusoids that are stored and never trained.

Dims: B batch, P frames, C bins of frequency, S = P / 2 source positions, T target length, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Integer, PRNGKeyArray, Shaped

from jaxft.attention import MaskSpec
from jaxft.errors import UserError
from jaxft.layers import ACTIVATIONS, Compute, Initializer, dropout, subkey, usual_promotion
from jaxft.layers.matmul import affine
from jaxft.layers.modules import declare
from jaxft.models import bart_like, bart_like_files, encoder_decoder
from jaxft.models.bart_like import BartLikeConfig, vocabulary
from jaxft.models.caches import Cache
from jaxft.models.contract import Facts, Field, Head, Output
from jaxft.models.encoder_decoder import Source, Target
from jaxft.models.heads import normal
from jaxft.models.layout import Layout, Rule, Tensors, has_own
from jaxft.models.spec_augment import Spans, masked

Array = jax.Array

MODEL_TYPES = {"whisper": "Whisper"}
SPEECH_TO_TEXT = "speech_to_text"
"""The head that gives each place of a transcript a logit for every token."""
FRAMES_OF_POSITION = 2
"""How many frames the convolutions make one vector of."""


@dataclass(frozen=True)
class Config(BartLikeConfig):
    """Everything that changes the maths."""

    vocab_size: int = 51865
    hidden_size: int = 384
    num_hidden_layers: int = 4
    num_decoder_layers: int = 4
    num_attention_heads: int = 6
    num_decoder_heads: int = 6
    intermediate_size: int = 1536
    decoder_intermediate_size: int = 1536
    max_position_embeddings: int = 448
    """Tokens that a transcript may have."""
    max_source_positions: int = 1500
    """Vectors that the encoder makes of a stretch of sound; it reads twice as many frames, no more and no fewer."""
    num_mel_bins: int = 80
    hidden_dropout: float = 0.0
    pad_token_id: int | None = 50256
    decoder_start_token_id: int = 50257
    apply_spec_augment: bool = False
    """Training steps see frames of which spans are 0 (SpecAugment, Park et al. 2019)."""
    mask_time_prob: float = 0.05
    """The share of frames that spans over time would cover if none overlapped."""
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    """The same of bins of frequency."""
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0

    EMBEDDING_NORMS: ClassVar[bool] = False
    KEY_BIASES: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_embedding:
            raise UserError("model.arch: scale_embedding=true: Whisper never scales its embeddings; set it to false")
        if self.hidden_size < 4 or self.hidden_size % 2:
            raise UserError(f"model.arch: hidden_size={self.hidden_size}: sines and cosines need an even one from 4 on")
        for name, least in (("num_mel_bins", 1), ("max_source_positions", 1), ("mask_time_length", 1),
                            ("mask_feature_length", 1), ("mask_time_min_masks", 0), ("mask_feature_min_masks", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"model.arch: {name}={getattr(self, name)} must be at least {least}")
        for name in ("mask_time_prob", "mask_feature_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"model.arch: {name}={getattr(self, name)} must lie in 0..1")
        for name, spans, most in (
            ("time", self.time_spans, self.frames),
            ("feature", self.bin_spans, self.num_mel_bins),
        ):
            if self.apply_spec_augment and spans.share > 0 and spans.length > most:
                raise UserError(f"model.arch: mask_{name}_length={spans.length} is more than the {most} there are")

    @property
    def pre_norms(self) -> bool:
        return True

    @property
    def frames(self) -> int:
        """Frames that the encoder reads, P."""
        return FRAMES_OF_POSITION * self.max_source_positions

    @property
    def time_spans(self) -> Spans:
        """What SpecAugment takes out of a stretch's frames."""
        return Spans(self.mask_time_prob, self.mask_time_length, self.mask_time_min_masks)

    @property
    def bin_spans(self) -> Spans:
        """What SpecAugment takes out of its bins of frequency."""
        return Spans(self.mask_feature_prob, self.mask_feature_length, self.mask_feature_min_masks)


TINY = Config(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_decoder_layers=3, num_attention_heads=4, num_decoder_heads=2,
    intermediate_size=64, decoder_intermediate_size=48, max_position_embeddings=64, max_source_positions=24, num_mel_bins=8,
    initializer_range=0.1, hidden_dropout=0.1, attention_dropout=0.1, activation_dropout=0.1, pad_token_id=0,
    decoder_start_token_id=1,
)  # fmt: skip


def _head(config: Config, compute: Compute, name: str) -> nn.Module:
    return vocabulary(config, compute, name, fixed_bias=False)


def _head_rules(config: Config) -> tuple[Rule, ...]:
    return () if config.tie_word_embeddings else (Rule("head/kernel", HEAD_TABLE, "v d -> d v"),)


HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    SPEECH_TO_TEXT: Head("ForConditionalGeneration", _head, _head_rules),
}


def sinusoids(places: int, width: int) -> Float32[np.ndarray, "S D"]:
    """Sines, then cosines, of each position, at wavelengths from 2 pi to 20,000 pi."""
    half = width // 2
    scales = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    angles = np.arange(places)[:, None] * scales
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


class Convolution(nn.Module):
    """A convolution over places, each result of three neighbours, padded with zeros: [B, P, C] to [B, P / stride, D]."""

    shape: tuple[int, int]
    """C, D."""
    stride: int
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "B P C"]) -> Float[Array, "B _ D"]:
        (c, d), how = self.shape, self.compute
        names = (None, None, "embed")
        kernel = declare(self, "kernel", self.initial, names, (WIDTH, c, d), how.param_dtype)
        bias = declare(self, "bias", nn.initializers.zeros, names[2:], (d,), how.param_dtype)
        # One product of neighbours beside each other: it is computed, and split over devices, as every other one.
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        seen = [padded[:, at : at + x.shape[1] : self.stride] for at in range(WIDTH)]
        weight = (None, "embed")
        matrix = how.rules.place_gradient(kernel.reshape(WIDTH * c, d), *weight)
        return affine("abd,de->abe", jnp.concatenate(seen, -1), matrix, bias, how, weight=weight)


WIDTH = 3
"""Frames that a convolution sees at once."""


class Places(nn.Module):
    """A table of positions that stays as it was read, [S, D]."""

    shape: tuple[int, int]
    compute: Compute

    @nn.compact
    def __call__(self) -> Float[Array, "S D"]:
        def initial(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            del key
            return jnp.asarray(sinusoids(*shape), dtype)

        # One named axis alone: what is never trained must not decay either.
        table = declare(self, "embedding", initial, (None, "embed"), self.shape, self.compute.param_dtype)
        return jax.lax.stop_gradient(table)


class Model(bart_like.BartLikeModel[Config]):
    """The encoder-decoder, with a head as asked."""

    HEADS = HEADS

    @property
    def facts(self) -> Facts:
        return facts(self.config)

    def placed(self, side: str, positions: Integer[Array, "B S"]) -> Float[Array, "B S D"]:
        c = self.config
        assert side == "decoder"
        shape, names = (c.max_position_embeddings, c.hidden_size), ("positions", "embed")
        return bart_like.Embed(*shape, names, self.compute, normal(c), name="decoder_positions")(positions)

    @nn.compact
    @usual_promotion
    def __call__(
        self,
        frames: Float[Array | np.ndarray, "B P C"] | None,
        decoder_tokens: Integer[Array, "B T"] | None = None,
        decoder_mask: Shaped[Array, "B T"] | None = None,
        decoder_positions: Integer[Array, "B T"] | None = None,
        decoder_segments: Integer[Array, "B T"] | None = None,
        targets: Integer[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        hidden_states: bool = False,
        cache: Cache | None = None,
        **unknown: object,
    ) -> Output:
        """Runs the model.

        Args:
          frames: log-mel frames of sound, as many as the model reads. None: the cache has what the encoder made of them.
          decoder_segments: for several texts of one stretch of sound, 0 is padding; they do not see each other.
          decoder_tokens, decoder_mask, decoder_positions, targets, key, hidden_states, cache: as of
            :class:`~jaxft.models.encoder_decoder.EncoderDecoder`. With a key, SpecAugment takes out spans where the Config says so.

        Raises:
          UserError: an argument that there is not, two keys, or a mesh of explicit axes; frames of another number or of other bins; more
            tokens than the model has positions; no source, neither as frames nor in a cache.
        """
        key = self._admitted(frames, decoder_tokens, cache, key, unknown)
        table, source = self.table(), None
        if frames is not None:
            memory = self._heard(jnp.asarray(frames), subkey(key, 0))
            source = Source(memory, jnp.ones(memory.shape[:2], bool))
        target = Target(decoder_tokens, decoder_mask, decoder_positions, decoder_segments)
        return self._answered(table, source, target, None, targets, subkey(key, 1), hidden_states, cache)

    def _heard(self, frames: Float[Array, "B P C"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        """What the encoder makes of sound."""
        c, how, d = self.config, self.compute, self.config.hidden_size
        if frames.shape[1:] != (c.frames, c.num_mel_bins):
            raise UserError(
                f"frames of the shape {frames.shape[1:]}: the model reads {c.frames} frames of {c.num_mel_bins} bins; pad or cut the sound"
            )
        if key is not None and c.apply_spec_augment:
            frames = masked(frames, jax.random.fold_in(key, 7), c.time_spans, c.bin_spans)
        gelu, initial = ACTIVATIONS["gelu"], normal(c)
        x = frames.astype(how.activation_dtype)
        x = gelu(Convolution((c.num_mel_bins, d), 1, how, initial, name="encoder_conv1")(x))
        x = gelu(Convolution((d, d), FRAMES_OF_POSITION, how, initial, name="encoder_conv2")(x))
        places = Places((c.max_source_positions, d), how, name="encoder_positions")()
        x = how.rules.constrain(x + places.astype(x.dtype), "batch", "length", "act_embed")
        return self.encoded(dropout(x, c.hidden_dropout, subkey(key, 0), how.dropout_bits), MaskSpec(), key).memory


def facts(config: Config) -> Facts:
    """What the rest of jaxft may know of a model of this Config."""
    text = encoder_decoder.facts(config)
    sound = {"frames": Field(("batch", config.frames, config.num_mel_bins), "float32")}
    of_target = {name: field for name, field in text.inputs.items() if name.startswith(("decoder_", "targets"))}
    encoder, decoder = text.stacks
    stacks = (dataclasses.replace(encoder, tokens=config.max_source_positions), decoder)
    return dataclasses.replace(text, inputs=sound | of_target, stacks=stacks, processor="audio")


# ------------------------------------------------------------------------------------------------ Hugging Face layout

_SAME = (
    *("num_mel_bins", "max_source_positions", "apply_spec_augment", "mask_time_prob", "mask_time_length"),
    *("mask_time_min_masks", "mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
)
_NAMES = {
    **{ours: theirs for ours, theirs in bart_like_files.NAMES.items() if ours != "scale_embedding"},
    "max_position_embeddings": "max_target_positions",
    **{name: name for name in _SAME},
}
"""Fields of :class:`Config`, and what config.json calls them."""
SUPERSEDED = (*bart_like_files.SUPERSEDED, "num_key_value_heads")
TABLE, HEAD_TABLE = "decoder.embed_tokens.weight", "proj_out.weight"


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: what :func:`jaxft.models.bart_like_files.config_from_hf` refuses.
    """
    return bart_like_files.config_from_hf(Config, hf, {}, _NAMES)


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return bart_like_files.config_to_hf(config, _NAMES)


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    # transformers ties the two only where they are equal, whatever config.json says.
    return {"tie_word_embeddings": False} if has_own(weights, HEAD_TABLE, TABLE) else {}


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    tied = (HEAD_TABLE,) if head is not None and config.tie_word_embeddings else ()
    rules = [Rule("embed/embedding", f"model.{TABLE}", spares=tied)]
    for name in ("conv1", "conv2"):
        theirs = f"model.encoder.{name}"
        rules += [Rule(f"encoder_{name}/kernel", f"{theirs}.weight", "d c w -> w c d")]
        rules += [Rule(f"encoder_{name}/bias", f"{theirs}.bias")]
    for side in ("encoder", "decoder"):
        rules += bart_like_files.side_rules(config, side)
    return Layout((*rules, *HEADS[head].rules(config)), "model.", (), (HEAD_TABLE,), ("head/*",))
