"""A decoder of any family: tokens to vectors, each of which sees those before it, with a cache if one is given; and its head.

A family adds its Config, embeddings, layers, and the names of its weights; those like Llama share ``decoder.py`` too.

Dims: B batch, S length, D model width, N query heads, K key/value heads, H head size, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Integer, PRNGKeyArray, PyTree, Shaped

from jaxft.attention import MaskSpec
from jaxft.errors import UserError
from jaxft.layers import Compute, Rotary, TokenScore, apply_stack, checked_call, stacked_params, subkey, usual_promotion
from jaxft.models.caches import Cache
from jaxft.models.contract import STARTS, Facts, Features, Head, Output, Stack, head_named, text_inputs

Array = jax.Array
_OPTIONS = ("key", "hidden_states", "attentions", "cache")


@dataclass(frozen=True)
class LayerKind:
    """What is static and differs by layer."""

    rope: Rotary | None = None
    """None: queries and keys are not turned."""
    window: int | None = None
    """A token sees itself and so many less one before it; None: all."""
    scale: float | None = None
    """What products of queries and keys are multiplied with; None: 1 / sqrt(head size)."""

    def mask(self, mask: MaskSpec, keys: int) -> MaskSpec:
        """What the layer sees of so many keys. A window as wide as these is none: more backends can do without."""
        near = self.window if self.window is not None and self.window < keys else None
        return dataclasses.replace(mask, window=near)


class CausalConfig(Protocol):
    """A Config, as far as every decoder's says so."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def key_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def kinds(self) -> tuple[LayerKind, ...]: ...


C = TypeVar("C", bound=CausalConfig)


class CausalModel(nn.Module, Generic[C]):
    """The decoder, with a head as asked. A family defines the methods that raise NotImplementedError here; they declare what they
    need within :meth:`__call__`."""

    config: C
    head: str | None = None
    compute: Compute = Compute()

    HEADS: ClassVar[Mapping[str | None, Head]]

    @property
    def facts(self) -> Facts:
        return facts(self.config)

    def embedded(
        self, tokens: Integer[Array, "B S"], positions: Integer[Array, "B S"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "V D"]]:
        """(what goes into the first layer, the table of tokens)."""
        raise NotImplementedError

    def layer(self) -> nn.Module:
        """A layer, called with (x, dropout key, mask, positions, kind, state=keys and values of a cache)."""
        raise NotImplementedError

    def normed(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What comes out of the last layer, normalised."""
        raise NotImplementedError

    def looked(
        self,
        layers: PyTree[Array],
        number: int,
        x: Float32[Array, "B S D"],
        mask: MaskSpec,
        positions: Integer[Array, "B S"],
        kind: LayerKind,
    ) -> Float32[Array, "B N S S"]:
        """How much each token looks at each other one in a layer.

        Args:
          layers: parameters, stacked.
          number: of the layer.
          x: what went into it.
        """
        raise NotImplementedError

    @nn.compact
    @usual_promotion
    def __call__(
        self,
        tokens: Integer[Array, "B S"],
        mask: Shaped[Array, "B S"] | None = None,
        positions: Integer[Array, "B S"] | None = None,
        segments: Integer[Array, "B S"] | None = None,
        starts: Integer[Array, "B E"] | None = None,
        targets: Integer[Array, "B S"] | None = None,
        key: PRNGKeyArray | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        cache: Cache | None = None,
        **unknown: object,
    ) -> Output:
        """Runs the model.

        Args:
          tokens: ids.
          mask: 0 or False where a token is padding. None: nothing is.
          positions: of the tokens. None: 0..S-1 in each row; with a cache, padding apart, they count on.
          segments: for packed rows, 0 is padding; tokens see only their own segment.
          starts: where each text of packed rows begins; logits of rows are then those of texts.
          targets: the next tokens; used where ``compute.vocab_tile`` is set.
          key: dropout key; so is ``rngs={"dropout": key}`` of ``apply``. None: deterministic.
          hidden_states: whether to give what went into the first layer and came out of each, too.
          attentions: whether to give the probabilities of attention, before dropout, computed apart from the backend.
          cache: what the model keeps of the tokens before these (:func:`jaxft.models.caches.init_cache`); the output has the next
            one. In a program, which cannot know how many places are filled, tokens beyond the last one give NaN; so does, where
            layers have windows shorter than the cache, padding between the tokens of a row: windows count places.

        Raises:
          UserError: S is beyond ``max_position_embeddings`` and no positions are given, or beyond the cache's places; an argument that
            there is not, two keys, or a mesh of explicit axes; segments or attentions with a cache.
        """
        key = checked_call(self, tokens, key, unknown, (*self.facts.inputs, *_OPTIONS))
        head = head_named(type(self).__module__.rpartition(".")[2], self.head, self.HEADS)
        c, (b, s) = self.config, tokens.shape
        if positions is None and s > c.max_position_embeddings:
            raise UserError(f"sequence length {s} is beyond the model's limit of {c.max_position_embeddings} positions")
        if cache is None:
            positions = jnp.broadcast_to(jnp.arange(s), (b, s)) if positions is None else positions
            spec = MaskSpec(None if mask is None else mask.astype(bool), segments, causal=True)
        elif segments is None and not attentions:
            cache, positions, spec = cache.admitted(tokens, mask, positions)
        else:
            raise UserError(
                f"a cache is of one text a row: no {'attentions' if segments is None else 'segments'} with it"
            )

        x, table = self.embedded(tokens, positions, subkey(key, 0))
        layer, count = self.layer(), c.num_hidden_layers
        example = (x[:1], None, MaskSpec(causal=True), positions[:1], c.kinds[-1])
        layers = stacked_params(self, "layers", layer, count, *example)
        past = None if cache is None else (cache.keys, cache.values)
        stack = (layer, layers, count, x, subkey(key, 1), spec, positions)
        x, states, new = apply_stack(*stack, keep=hidden_states or attentions, kinds=c.kinds, state=past)
        looked = None
        if attentions and states is not None:
            wide = [states[number].astype(jnp.float32) for number in range(count)]
            looked = [self.looked(layers, i, wide[i], spec, positions, kind) for i, kind in enumerate(c.kinds)]
        hidden = self.normed(x)
        if cache is not None and new is not None:
            hidden, cache = cache.with_room(hidden), cache.extended(*new)
            if any(kind.window is not None and kind.window < cache.length for kind in c.kinds):
                hidden = cache.without_gaps(hidden)
        # The last one normalised, as the reference has it.
        states = states.at[-1].set(hidden) if hidden_states and states is not None else None
        more = {"hidden_states": states, "attentions": None if looked is None else jnp.stack(looked), "cache": cache}
        if head.make is None:
            return Output(hidden, **more)
        features = Features(hidden, None, table, targets, starts, mask, segments)
        made = head.make(c, self.compute, "head")(features, subkey(key, 2))
        if isinstance(made, TokenScore):
            return Output(hidden, score=made, **more)
        return Output(hidden, logits=made, **more)


def facts(config: CausalConfig) -> Facts:
    """What the rest of jaxft may know of a decoder."""
    limit = config.max_position_embeddings
    inputs = text_inputs(config.vocab_size, config.pad_token_id, limit, scored="length", starts=STARTS)
    sizes = (config.hidden_size, config.num_attention_heads, config.key_heads, config.head_size)
    windows = tuple(kind.window for kind in config.kinds)
    windows = windows if any(window is not None for window in windows) else ()
    stack = Stack("layers", config.num_hidden_layers, *sizes, causal=True, windows=windows)
    return Facts(inputs, (stack,), limit)
