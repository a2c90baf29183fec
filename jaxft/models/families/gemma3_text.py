"""The texts of Gemma 3 (Gemma team 2025), as `transformers` computes them (`Gemma3TextModel`, `Gemma3ForCausalLM`, and its class for
texts).

A decoder like Gemma 2's, which normalises queries and keys of each head; most layers have a sliding window, and rotary positions of their
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from jaxft.errors import UserError
from jaxft.layers import Rotary
from jaxft.models import decoder, decoder_files
from jaxft.models.blocks import QueryKeyNorm
from jaxft.models.causal import LayerKind
from jaxft.models.contract import Head
from jaxft.models.layer_types import GLOBAL, LOCAL, rotaries_from_hf, rotaries_to_hf
from jaxft.models.layout import Layout

MODEL_TYPES = {"gemma3_text": "Gemma3"}
_BASES = {GLOBAL: ("rope_theta", 1_000_000.0), LOCAL: ("rope_local_base_freq", 10_000.0)}


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    vocab_size: int = 262_208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    max_position_embeddings: int = 131_072
    rope: Rotary = field(default_factory=lambda: Rotary(_BASES[GLOBAL][1]))
    """Rotary positions of global layers."""
    local_rope: Rotary = field(default_factory=lambda: Rotary(_BASES[LOCAL][1]))
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
    """``full_attention`` or ``sliding_attention``, for each layer; None: all but 5, 11, 17, ... are local."""
    final_logit_softcapping: float | None = None
    """Logits l of the vocabulary become cap tanh(l / cap); None: they stay."""

    SIZES: ClassVar[tuple[str, ...]] = ("head_dim", "sliding_window", "query_pre_attn_scalar")
    POST_NORMS: ClassVar[bool] = True
    ZERO_CENTRED: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        decoder_files.check_types(self, self.layer_types)
        decoder_files.check_caps(self, ("final_logit_softcapping",))

    @property
    def types(self) -> tuple[str, ...]:
        """The type of each layer: global or local."""
        return self.layer_types or decoder_files.every(_EVERY, self.num_hidden_layers)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What is static and differs by layer, for each one."""
        of_type = {GLOBAL: LayerKind(self.rope), LOCAL: LayerKind(self.local_rope, self.sliding_window)}
        return tuple(of_type[name] for name in self.types)

    @property
    def query_key_norm(self) -> QueryKeyNorm | None:
        """Over each head."""
        return QueryKeyNorm(self.rms_norm_eps, zero_centred=True)

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


_EVERY = 6
"""Layers of a period, of which the last is global."""
TINY = Config(
    **decoder.SMALL, head_dim=12, query_pre_attn_scalar=10, sliding_window=8, rope=Rotary(500.0, "linear", 4.0)
)  # fmt: skip

HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("TextModel"),
    "classification": dataclasses.replace(decoder_files.CLASSIFICATION, suffix="TextForSequenceClassification"),
    "causal_lm": decoder_files.CAUSAL_LM,
}


class Model(decoder.DecoderModel):
    """The decoder, with a head as asked."""

    HEADS = HEADS


facts, config_of_weights = decoder.facts, decoder_files.config_of_weights
_OWN = ("hidden_act", "layer_types", "local_rope")
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")
SUPERSEDED = (*decoder_files.SUPERSEDED, "rope_local_base_freq", *_PATTERNS)


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states.

    Raises:
      UserError: rotary positions or types of layers that are not supported, tokens that see those behind them, or a soft cap of attention,
        which the reference does not apply.
    """
    if hf.get("attn_logit_softcapping") is not None:
        raise UserError(
            "config.json: attn_logit_softcapping is not supported: the reference does not apply it here; remove it"
        )
    own = decoder_files.gemma_from_hf(hf, Config.num_hidden_layers)
    pattern = hf.get(_PATTERNS[0], _EVERY)
    if type(pattern) is not int or pattern < 1:
        raise UserError(f"config.json: sliding_window_pattern={pattern!r} must be a whole number, 1 or more")
    if "layer_types" not in own and pattern != _EVERY:
        layers = hf.get("num_hidden_layers", Config.num_hidden_layers)
        own["layer_types"] = list(decoder_files.every(pattern, layers)) if isinstance(layers, int) else []
    plain = {key: value for key, value in hf.items() if key not in ("rope_scaling", "rope_parameters", "rope_theta")}
    same = decoder_files.config_from_hf(Config, plain, _OWN)
    ropes = rotaries_from_hf(_with_scaling(hf), _BASES, Config.max_position_embeddings)
    return {**same, **own, "rope": ropes[GLOBAL], "local_rope": ropes[LOCAL]}


def _with_scaling(hf: Mapping[str, object]) -> dict[str, object]:
    """config.json with ``rope_scaling`` of v4, which is of global layers, where v5 has it."""
    scaling, stated = hf.get("rope_scaling"), hf.get("rope_parameters")
    found = {key: value for key, value in hf.items() if key != "rope_scaling"}
    if not scaling or not isinstance(scaling, Mapping) or not isinstance(stated, Mapping | None):
        return {**found, "rope_scaling": scaling}
    of_global = (stated or {}).get(GLOBAL) or {"rope_type": "default"}
    return {**found, "rope_parameters": {**(stated or {}), GLOBAL: {**of_global, **scaling}}}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    ropes = rotaries_to_hf({GLOBAL: config.rope, LOCAL: config.local_rope})
    own = {"hidden_activation": config.hidden_act, "layer_types": list(config.types), "rope_parameters": ropes}
    return {**decoder_files.config_to_hf(config, _OWN), **own}


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return decoder_files.hf_layout(config, head, HEADS)
