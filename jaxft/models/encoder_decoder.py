"""An encoder, and a decoder that looks at what it has read, in any family: source and target tokens to a vector of each target token,
with a cache if one is given; and the head.

A family adds its Config, embeddings, layers, and the names of its weights.

Dims: B batch, S source length, T target length, D model width, N heads, H head size, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Generic, NamedTuple, TypedDict, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, PRNGKeyArray, Shaped

from jaxft.attention import MaskSpec
from jaxft.errors import UserError
from jaxft.layers import (
    Compute,
    Embed,
    TokenScore,
    apply_stack,
    checked_call,
    stacked_params,
    subkey,
    usual_promotion,
)
from jaxft.models.caches import Cache, Memory
from jaxft.models.contract import Facts, Features, Head, Output, head_named
from jaxft.models.encoder_decoder_facts import Seq2SeqConfig, facts
from jaxft.models.source_heads import SourceHead, end_of_texts, real, shifted_right

Array = jax.Array
_OPTIONS = ("key", "hidden_states", "cache", "memory")
SEQ2SEQ_LM = "seq2seq_lm"
"""The head that gives each place of the target a logit for every token."""

State = tuple[Array, Array, Array | None, Array | None]
"""Keys and values of target tokens, and of the source, of one decoder layer."""


class States(TypedDict, total=False):
    """What an output has beside the head's."""

    hidden_states: Float[Array, "states B S D"] | None
    cache: Cache | None
    memory: Float[Array, "B source D"] | None


class Encoded(NamedTuple):
    """What an encoder makes of sources."""

    memory: Float[Array, "B S D"]
    states: Float[Array, "states B S D"] | None
    """What went into its first layer and came out of each, the last one normalised; None unless asked for."""


class Source(NamedTuple):
    """What an encoder has read."""

    memory: Float[Array, "R S D"] | None
    """What it made of it; None: a cache has the keys and values."""
    there: Bool[Array, "R S"]
    """Which places hold something."""


class Target(NamedTuple):
    """Texts so far; arguments of a model's call."""

    tokens: Integer[Array, "B T"] | None
    mask: Shaped[Array, "B T"] | None
    positions: Integer[Array, "B T"] | None
    segments: Integer[Array, "B T"] | None


class Texts(NamedTuple):
    """Sources; arguments of a model's call."""

    tokens: Integer[Array, "B S"]
    mask: Shaped[Array, "B S"] | None
    positions: Integer[Array, "B S"] | None
    segments: Integer[Array, "B S"] | None
    starts: Integer[Array, "B E"] | None


C = TypeVar("C", bound=Seq2SeqConfig)


class EncoderDecoder(nn.Module, Generic[C]):
    """The model, with a head as asked. A family defines the methods that raise NotImplementedError here; they declare what they need
    within :meth:`__call__`."""

    config: C
    head: str | None = None
    compute: Compute = Compute()

    HEADS: ClassVar[Mapping[str | None, Head]]

    @property
    def facts(self) -> Facts:
        return facts(self.config, self.HEADS.get(self.head))

    def table(self) -> Embed:
        """The table of tokens, of both sides."""
        raise NotImplementedError

    def embedded(
        self,
        table: Embed,
        side: str,
        tokens: Integer[Array, "B S"],
        positions: Integer[Array, "B S"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B S D"]:
        """What goes into the first layer of a side, ``encoder`` or ``decoder``."""
        raise NotImplementedError

    def layer(self, side: str) -> nn.Module:
        """A layer: of an encoder called with (x, dropout key, mask, bias), of a decoder with (x, dropout key, mask, bias, memory, its mask,
        state=...), to x, and with a state (x, the next one)."""
        raise NotImplementedError

    def bias(self, side: str, first: Array | int, queries: int, keys: int) -> Float[Array, "1 N T _"] | None:
        """What a side's tokens add to the logits of attention to each other; the first query is at place ``first`` among the keys."""
        del side, first, queries, keys
        return None

    def normed(self, side: str, x: Float[Array, "B S D"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        """What comes out of the last layer of a side, normalised."""
        raise NotImplementedError

    @property
    def begins(self) -> int | None:
        """What a decoder that reads the source again begins with; None: the text's last token."""
        return self.config.decoder_start_token_id

    def scored(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the vocabulary sees of the decoder's vectors."""
        return x

    @nn.compact
    @usual_promotion
    def __call__(
        self,
        tokens: Integer[Array, "B S"] | None,
        mask: Shaped[Array, "B S"] | None = None,
        positions: Integer[Array, "B S"] | None = None,
        segments: Integer[Array, "B S"] | None = None,
        starts: Integer[Array, "B E"] | None = None,
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
          tokens: ids of sources. None: the cache has what the encoder made of them.
          mask: 0 or False where a token is padding. None: nothing is.
          positions: of the tokens. None: 0..S-1 in each row.
          segments: for packed rows, 0 is padding; tokens see only their own segment, on both sides.
          starts: where each text of packed rows begins; logits of rows are then those of texts.
          decoder_tokens: ids of targets, one place to the right: the first is ``decoder_start_token_id``. None: that one alone.
          decoder_mask, decoder_positions, decoder_segments: the same of targets. With a cache, positions count on.
          targets: what the logits are scored against; used where ``compute.vocab_tile`` is set.
          key: dropout key; so is ``rngs={"dropout": key}`` of ``apply``. None: deterministic.
          hidden_states: whether to give what went into the decoder's first layer and came out of each, too.
          cache: what the model keeps of target tokens before these, and of the source
            (:func:`jaxft.models.caches.init_cache`); the output has the next one.

        Raises:
          UserError: an argument that there is not, two keys, or a mesh of explicit axes; more tokens than the model has positions; no
            source, neither as tokens nor in a cache; targets or a cache where the head answers about the source.
        """
        head = self._head()
        if isinstance(head, SourceHead):
            given = {"decoder_tokens": decoder_tokens, "decoder_mask": decoder_mask, "cache": cache}
            unknown |= {name: value for name, value in given.items() if value is not None}
        key = self._admitted(tokens, decoder_tokens, cache, key, unknown)
        table, source = self.table(), None
        if isinstance(head, SourceHead) and tokens is not None:
            texts = Texts(tokens, mask, positions, segments, starts)
            return self._of_source(table, head, texts, key, hidden_states)
        if tokens is not None:
            memory, _ = self._read(table, tokens, mask, positions, segments, subkey(key, 0))
            read = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
            source = Source(memory, read)
        target = Target(decoder_tokens, decoder_mask, decoder_positions, decoder_segments)
        apart = None if decoder_segments is None else (decoder_segments, segments)
        return self._answered(table, source, target, apart, targets, subkey(key, 1), hidden_states, cache)

    def _head(self) -> Head:
        return head_named(type(self).__module__.rpartition(".")[2], self.head, self.HEADS)

    def _admitted(
        self,
        source: Array | np.ndarray | None,
        decoder_tokens: Array | None,
        cache: Cache | None,
        key: PRNGKeyArray | None,
        unknown: Mapping[str, object],
    ) -> PRNGKeyArray | None:
        """The dropout key of a call, which is one that can be answered."""
        anything = source if source is not None else decoder_tokens
        if anything is None or (source is None and (cache is None or cache.memory is None)):
            raise UserError(
                f"an encoder-decoder needs a source: give {self.facts.reads}, or a cache of which it has read some"
            )
        return checked_call(self, anything, key, unknown, (*self.facts.inputs, *_OPTIONS))

    def _read(
        self,
        table: Embed,
        tokens: Array,
        mask: Array | None,
        positions: Array | None,
        segments: Array | None,
        key: PRNGKeyArray | None,
        keep: bool = False,
    ) -> Encoded:
        """What the encoder makes of sources.

        Args:
          keep: whether to give what went into its first layer and came out of each, too.
        """
        c, (b, s) = self.config, tokens.shape
        if positions is None and c.limit is not None and s > c.limit:
            raise UserError(f"source of {s} tokens is beyond the model's limit of {c.limit} positions")
        positions = jnp.broadcast_to(jnp.arange(s), (b, s)) if positions is None else positions
        spec = MaskSpec(None if mask is None else mask.astype(bool), segments)
        return self.encoded(self.embedded(table, "encoder", tokens, positions, subkey(key, 0)), spec, key, keep)

    def encoded(
        self, x: Float[Array, "B S D"], spec: MaskSpec, key: PRNGKeyArray | None, keep: bool = False
    ) -> Encoded:
        """What the encoder's layers make of what goes into the first."""
        layers, s = self.config.num_hidden_layers, x.shape[1]
        layer, bias = self.layer("encoder"), self.bias("encoder", 0, s, s)
        example = (x[:1], None, MaskSpec(), None)
        stacked = stacked_params(self, "encoder", layer, layers, *example)
        x, states, _ = apply_stack(layer, stacked, layers, x, subkey(key, 1), spec, bias, keep=keep)
        memory = self.normed("encoder", x, subkey(key, 2))
        return Encoded(memory, None if states is None else states.at[-1].set(memory))

    def _of_source(
        self, table: Embed, head: SourceHead, texts: Texts, key: PRNGKeyArray | None, hidden_states: bool
    ) -> Output:
        """What a head says of sources that the encoder has read, and the decoder after it."""
        alone, of_decoder = head.side == "encoder", subkey(key, 1)
        sides = (texts.tokens, texts.mask, texts.positions, texts.segments, subkey(key, 0))
        memory, states = self._read(table, *sides, keep=hidden_states and alone)
        if alone:
            features = Features(memory, None, table.embedding, None, texts.starts, texts.mask, texts.segments)
            return self._headed(head, features, memory, subkey(of_decoder, 3), {"hidden_states": states})
        there = real(texts.tokens, texts.mask, texts.segments)
        if self.config.pad_token_id is not None:  # which is all that the reference looks at
            there &= texts.tokens != self.config.pad_token_id
        again = shifted_right(texts.tokens, there, texts.segments, self.begins)
        # As in the reference, the decoder is told of no padding: no token sees what is behind it.
        target = Target(again, None, texts.positions, texts.segments)
        apart = None if texts.segments is None else (texts.segments, texts.segments)
        source = Source(memory, jnp.ones(texts.tokens.shape, bool) if texts.mask is None else texts.mask.astype(bool))
        return self._written(table, head, target, source, apart, None, of_decoder, hidden_states, None, texts)

    def _answered(
        self,
        table: Embed,
        source: Source | None,
        target: Target,
        apart: tuple[Array, Array | None] | None,
        targets: Array | None,
        key: PRNGKeyArray | None,
        hidden_states: bool,
        cache: Cache | None,
    ) -> Output:
        """What the decoder and the head make of targets so far.

        Args:
          source: what the encoder has read; None: the cache has it.
          apart: segments of targets, and of the sources that they see. None: a target sees all of its row's source.
        """
        head = self._head()
        if source is None:
            assert cache is not None
            assert cache.memory is not None
            source = Source(None, cache.memory.mask)
        if target.tokens is None:
            begun = jnp.full((source.there.shape[0], 1), self.config.decoder_start_token_id, jnp.int32)
            target = target._replace(tokens=begun)
        return self._written(table, head, target, source, apart, targets, key, hidden_states, cache)

    def _written(
        self,
        table: Embed,
        head: Head,
        target: Target,
        source: Source,
        apart: tuple[Array, Array | None] | None,
        targets: Array | None,
        key: PRNGKeyArray | None,
        hidden_states: bool,
        cache: Cache | None,
        texts: Texts | None = None,
    ) -> Output:
        c, (tokens, mask, positions, own_segments), (memory, read) = self.config, target, source
        assert tokens is not None
        b, t = tokens.shape
        if positions is None and cache is None and c.limit is not None and t > c.limit:
            raise UserError(f"target of {t} tokens is beyond the model's limit of {c.limit} positions")
        if cache is None:
            positions = jnp.broadcast_to(jnp.arange(t), (b, t)) if positions is None else positions
            spec = MaskSpec(None if mask is None else mask.astype(bool), own_segments, causal=True)
        elif own_segments is None:
            cache, positions, spec = cache.admitted(tokens, mask, positions)
        else:
            raise UserError("a cache is of one target a row: no decoder_segments with it")
        first, length = (0, t) if cache is None else (cache.filled, cache.length)
        crossed = MaskSpec(read) if apart is None else MaskSpec(read, apart[0], key_segments=apart[1])
        x = self.embedded(table, "decoder", tokens, positions, subkey(key, 0))
        layer, bias = self.layer("decoder"), self.bias("decoder", first, t, length)
        example_memory = jnp.zeros_like(x[:1]) if memory is None else memory[:1]
        example = (x[:1], None, MaskSpec(causal=True), None, example_memory, MaskSpec())
        layers = stacked_params(self, "decoder", layer, c.num_decoder_layers, *example)
        past: State | None = None
        if cache is not None:
            known = cache.memory if memory is None else None  # a source that is given is another one
            of_source = (None, None) if known is None else (known.keys, known.values)
            past = (cache.keys, cache.values, of_source[0], of_source[1])
        stack = (layer, layers, c.num_decoder_layers, x, subkey(key, 1), spec, bias, memory, crossed)
        x, states, new = apply_stack(*stack, keep=hidden_states, state=past)
        hidden = self.normed("decoder", x, subkey(key, 2))
        if cache is not None and new is not None:
            keys, values, source_keys, source_values = new
            hidden, cache = cache.with_room(hidden), cache.extended(keys, values)
            if source_keys is not None:
                cache = dataclasses.replace(cache, memory=Memory(source_keys, source_values, read))
        states = states.at[-1].set(hidden) if hidden_states and states is not None else None
        more: States = {"hidden_states": states, "cache": cache, "memory": memory}
        seen = Features(hidden if texts is not None else self.scored(hidden), None, table.embedding, targets)
        if texts is not None:
            seen = self._seen(seen, head, texts)
        return self._headed(head, seen, hidden, subkey(key, 3), more)

    def _seen(self, seen: Features, head: Head, texts: Texts) -> Features:
        """What a head sees of a decoder that has read the source again."""
        ends, (tokens, mask, _, segments, starts) = self.facts.end, texts
        seen = seen._replace(mask=mask, segments=segments, starts=starts)
        if not head.pooled:
            return seen
        last = jnp.zeros(tokens.shape, bool) if ends is None else tokens == ends
        return seen._replace(pooled=end_of_texts(seen.hidden, last, real(tokens, mask, segments), segments, starts))

    def _headed(
        self, head: Head, seen: Features, hidden: Float[Array, "B T D"], key: PRNGKeyArray | None, more: States
    ) -> Output:
        """The output of ``hidden``, with what a head makes of it."""
        if head.make is None:
            return Output(hidden, **more)
        made = head.make(self.config, self.compute, "head")(seen, key)
        if isinstance(made, TokenScore):
            return Output(hidden, score=made, **more)
        return Output(hidden, seen.pooled, made, **more)
