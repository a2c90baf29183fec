"""What the rest of jaxft may know of an encoder-decoder, whichever its family."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from jaxft.data.batch import Field, Fields
from jaxft.models.contract import STARTS, Facts, Head, Stack, text_inputs
from jaxft.models.source_heads import SourceHead


class Seq2SeqConfig(Protocol):
    """A Config, as far as every encoder-decoder's says so."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_decoder_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def decoder_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def decoder_head_size(self) -> int: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def decoder_start_token_id(self) -> int: ...


def facts(config: Seq2SeqConfig, head: Head | None = None) -> Facts:
    """What the rest of jaxft may know of an encoder-decoder, with a head."""
    encoder = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_attention_heads,
        config.head_size,
    )
    heads = (config.decoder_heads, config.decoder_heads, config.decoder_head_size)
    decoder = (config.num_decoder_layers, config.hidden_size, *heads)
    first, second = (
        Stack("encoder", *encoder),
        Stack("decoder", *decoder, causal=True, axis="target", looks_at="length"),
    )
    tokens = (config.vocab_size, config.pad_token_id, config.limit)
    if not isinstance(head, SourceHead):
        return Facts(inputs(*tokens), (first, second), config.limit, config.decoder_start_token_id)
    read = text_inputs(*tokens, scored="length", starts=STARTS)
    fields = {name: field for name, field in read.items() if name != "targets"}
    again = () if head.side == "encoder" else (dataclasses.replace(second, axis="length"),)
    return Facts(
        fields, (first, *again), config.limit, end=getattr(config, "eos_token_id", None) if head.pooled else None
    )


def inputs(vocabulary: int, padding: int | None, limit: int | None) -> Fields:
    """The inputs of a model of source and target texts."""
    of_source = text_inputs(vocabulary, padding, limit, scored="target")
    places = ("batch", "target")
    return {
        **{name: field for name, field in of_source.items() if name not in ("predict", "targets")},
        "decoder_tokens": Field(places, fill=padding or 0, count=vocabulary),
        "decoder_mask": Field(places, value=1),
        "decoder_positions": Field(places, count=limit),
        "decoder_segments": Field(places),
        "targets": of_source["targets"],
    }
