"""An encoder, and a decoder that looks at what it has read, in any family: source and target tokens to a vector of each target token,
with a cache if one is given; and the head.

A family adds its Config, embeddings, layers, and the names of its weights.

Dims: B batch, S source length, T target length, D model width, N heads, H head size, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Generic, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer, PRNGKeyArray, Shaped

from jaxft.attention import MaskSpec, attend
from jaxft.data.batch import Field, Fields
from jaxft.errors import UserError
from jaxft.layers import (
    Compute,
    Embed,
    FromHeads,
    Initializer,
    Projection,
    TokenScore,
    apply_stack,
    checked_call,
    project,
    project_together,
    stacked_params,
    subkey,
    usual_promotion,
)
from jaxft.models.blocks import KeysAndValues
from jaxft.models.caches import Cache, Memory
from jaxft.models.contract import Facts, Features, Head, Output, Stack, head_named, text_inputs

Array = jax.Array
_OPTIONS = ("key", "hidden_states", "cache", "memory")
SEQ2SEQ_LM = "seq2seq_lm"
"""The head that gives each place of the target a logit for every token."""

State = tuple[Array, Array, Array | None, Array | None]
"""Keys and values of target tokens, and of the source, of one decoder layer."""


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


C = TypeVar("C", bound=Seq2SeqConfig)


class Attention(nn.Module):
    """Multi-head attention of tokens to each other, or to what an encoder has read: [B, S, D] to [B, S, D]; and keys and values."""

    heads: int
    head_size: int
    compute: Compute
    initial: Initializer
    """Initialiser of keys and values."""
    query_initial: Initializer
    out_initial: Initializer
    rate: float = 0.0
    """Dropout of probabilities."""
    biased: bool = False
    scale: float | None = None
    """What products of queries and keys are multiplied with; None: 1 / sqrt(head size)."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: MaskSpec,
        key: PRNGKeyArray | None,
        bias: Float[Array, "1 N T _"] | None = None,
        *,
        past: KeysAndValues | None = None,
        memory: Float[Array, "R S D"] | KeysAndValues | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysAndValues]:
        """(the result, keys and values of what is looked at).

        Args:
          mask: which key each token may see.
          key: dropout key; None: no dropout.
          bias: added to the logits.
          past: keys and values of a cache with room for these, which stand at place ``mask.first``.
          memory: what an encoder has read, or its keys and values; each of its R rows is of B / R neighbouring ones. None: tokens look at
            each other.
        """
        rules, names, h = self.compute.rules, ("embed", "heads", None), self.head_size

        def projection(name: str, initial: Initializer) -> tuple[Array, Array | None]:
            shape = (x.shape[-1], self.heads, h)
            return Projection(shape, names, self.compute, initial, self.biased, name=name)()

        def placed(y: Array, length: str) -> Array:
            return rules.constrain(y, "batch", "act_heads", length, None)

        query, seen = projection("query", self.query_initial), "target" if memory is not None else "length"
        if memory is None:
            parts = [query, projection("key", self.initial), projection("value", self.initial)]
            q, k, v = (placed(y, seen) for y in project_together(x, parts, names, self.compute))
            new = (k, v)
        else:
            q = placed(project(x, query, names, self.compute, False), seen)
            if isinstance(memory, tuple):
                k, v = memory
            else:
                parts = [projection(name, self.initial) for name in ("key", "value")]
                k, v = (placed(y, "length") for y in project_together(memory, parts, names, self.compute))
            new = (k, v)
        if past is not None:
            new = (k.astype(past[0].dtype), v.astype(past[1].dtype))
            k, v = (jax.lax.dynamic_update_slice_in_dim(*pair, mask.first, 2) for pair in zip(past, new, strict=True))
        several = q.shape[0] // k.shape[0]
        mixed = attend(_beside(q, several), k, v, mask, self.compute, self.rate, key, scale=self.scale, bias=bias)
        out = FromHeads(
            (self.heads, h, x.shape[-1]),
            ("heads", None, "embed"),
            self.compute,
            self.out_initial,
            self.biased,
            name="out",
        )
        return out(_apart(mixed, several)), new


def _beside(q: Float[Array, "B N T H"], several: int) -> Float[Array, "R N _ H"]:
    """Queries of rows that see the same keys, as queries of one row."""
    if several == 1:
        return q
    b, n, t, h = q.shape
    return q.reshape(b // several, several, n, t, h).transpose(0, 2, 1, 3, 4).reshape(b // several, n, several * t, h)


def _apart(mixed: Float[Array, "R N _ H"], several: int) -> Float[Array, "B N T H"]:
    """The inverse of :func:`_beside`."""
    if several == 1:
        return mixed
    r, n, all_of_them, h = mixed.shape
    apart = mixed.reshape(r, n, several, all_of_them // several, h).transpose(0, 2, 1, 3, 4)
    return apart.reshape(r * several, n, all_of_them // several, h)


class EncoderDecoder(nn.Module, Generic[C]):
    """The model, with a head as asked. A family defines the methods that raise NotImplementedError here; they declare what they need
    within :meth:`__call__`."""

    config: C
    head: str | None = None
    compute: Compute = Compute()

    HEADS: ClassVar[Mapping[str | None, Head]]

    @property
    def facts(self) -> Facts:
        return facts(self.config)

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
          decoder_tokens: ids of targets, one place to the right: the first is ``decoder_start_token_id``. None: that one alone.
          decoder_mask, decoder_positions, decoder_segments: the same of targets. With a cache, positions count on.
          targets: what the logits are scored against; used where ``compute.vocab_tile`` is set.
          key: dropout key; so is ``rngs={"dropout": key}`` of ``apply``. None: deterministic.
          hidden_states: whether to give what went into the decoder's first layer and came out of each, too.
          cache: what the model keeps of target tokens before these, and of the source
            (:func:`jaxft.models.caches.init_cache`); the output has the next one.

        Raises:
          UserError: an argument that there is not, two keys, or a mesh of explicit axes; more tokens than the model has positions; no
            source, neither as tokens nor in a cache.
        """
        anything = tokens if tokens is not None else decoder_tokens
        if anything is None or (tokens is None and (cache is None or cache.memory is None)):
            raise UserError("an encoder-decoder needs a source: give tokens, or a cache of which it has read some")
        key = checked_call(self, anything, key, unknown, (*self.facts.inputs, *_OPTIONS))
        head = head_named(type(self).__module__.rpartition(".")[2], self.head, self.HEADS)
        table, memory = self.table(), None
        if tokens is not None:
            memory = self._read(table, tokens, mask, positions, segments, subkey(key, 0))
            read = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        else:
            assert cache is not None
            assert cache.memory is not None
            read = cache.memory.mask
        if decoder_tokens is None:
            decoder_tokens = jnp.full((read.shape[0], 1), self.config.decoder_start_token_id, jnp.int32)
        places = (decoder_tokens, decoder_mask, decoder_positions)
        seen = (memory, read, segments, decoder_segments)
        return self._written(table, head, places, seen, targets, subkey(key, 1), hidden_states, cache)

    def _read(
        self,
        table: Embed,
        tokens: Array,
        mask: Array | None,
        positions: Array | None,
        segments: Array | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B S D"]:
        """What the encoder makes of sources."""
        c, (b, s) = self.config, tokens.shape
        if positions is None and c.limit is not None and s > c.limit:
            raise UserError(f"source of {s} tokens is beyond the model's limit of {c.limit} positions")
        positions = jnp.broadcast_to(jnp.arange(s), (b, s)) if positions is None else positions
        spec = MaskSpec(None if mask is None else mask.astype(bool), segments)
        x = self.embedded(table, "encoder", tokens, positions, subkey(key, 0))
        layer, bias = self.layer("encoder"), self.bias("encoder", 0, s, s)
        example = (x[:1], None, MaskSpec(), None)
        layers = stacked_params(self, "encoder", layer, c.num_hidden_layers, *example)
        x, _, _ = apply_stack(layer, layers, c.num_hidden_layers, x, subkey(key, 1), spec, bias)
        return self.normed("encoder", x, subkey(key, 2))

    def _written(
        self,
        table: Embed,
        head: Head,
        places: tuple[Array, Array | None, Array | None],
        seen: tuple[Array | None, Bool[Array, "R S"], Array | None, Array | None],
        targets: Array | None,
        key: PRNGKeyArray | None,
        hidden_states: bool,
        cache: Cache | None,
    ) -> Output:
        """What the decoder and the head make of targets so far."""
        c, (tokens, mask, positions), (memory, read, segments, own_segments) = self.config, places, seen
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
        source = MaskSpec(read, own_segments, key_segments=segments if own_segments is not None else None)
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
        stack = (layer, layers, c.num_decoder_layers, x, subkey(key, 1), spec, bias, memory, source)
        x, states, new = apply_stack(*stack, keep=hidden_states, state=past)
        hidden = self.normed("decoder", x, subkey(key, 2))
        if cache is not None and new is not None:
            keys, values, source_keys, source_values = new
            hidden, cache = cache.with_room(hidden), cache.extended(keys, values)
            if source_keys is not None:
                cache = dataclasses.replace(cache, memory=Memory(source_keys, source_values, read))
        states = states.at[-1].set(hidden) if hidden_states and states is not None else None
        more = {"hidden_states": states, "cache": cache, "memory": memory}
        if head.make is None:
            return Output(hidden, **more)
        seen_by_head = Features(self.scored(hidden), None, table.embedding, targets)
        made = head.make(c, self.compute, "head")(seen_by_head, subkey(key, 3))
        if isinstance(made, TokenScore):
            return Output(hidden, score=made, **more)
        return Output(hidden, logits=made, **more)


def facts(config: Seq2SeqConfig) -> Facts:
    """What the rest of jaxft may know of an encoder-decoder."""
    encoder = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_attention_heads,
        config.head_size,
    )
    heads = (config.decoder_heads, config.decoder_heads, config.decoder_head_size)
    decoder = (config.num_decoder_layers, config.hidden_size, *heads)
    stacks = (Stack("encoder", *encoder), Stack("decoder", *decoder, causal=True, axis="target", looks_at="length"))
    return Facts(
        inputs(config.vocab_size, config.pad_token_id, config.limit),
        stacks,
        config.limit,
        config.decoder_start_token_id,
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
