"""Keys and values of tokens that a decoder has read, so that further tokens need not read them again.

Dims: B batch, S new tokens, T places, K key/value heads, H head size, L layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int32, Integer, Shaped

from jaxft.attention import MaskSpec
from jaxft.errors import UserError

if TYPE_CHECKING:  # whose outputs hold a cache
    from jaxft.models.contract import Model

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Keys and values of what an encoder has read, for each layer of a decoder that looks at it. A row of it may be of several
    neighbouring rows of the decoder, which go on from the same source."""

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
    mask: Bool[Array, "B S"]
    """Which places hold a token of the source."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What a decoder keeps of the tokens it has read: as many places in every row, of which the first ``filled`` are taken.

    Rows of a batch take places together. Where a row had padding, on either side, its place is taken and never seen, and does
    not count as a position.
    """

    keys: Float[Array, "L B K T H"]
    values: Float[Array, "L B K T H"]
    mask: Bool[Array, "B T"]
    """Which places hold a token."""
    filled: Int32[Array, ""]
    """How many places are taken."""
    memory: Memory | None = None
    """What a decoder sees of its encoder; None before that has read, and where there is none."""

    @property
    def length(self) -> int:
        """Places of a row, T."""
        return self.mask.shape[1]

    def admitted(
        self,
        tokens: Integer[Array, "B S"],
        mask: Shaped[Array, "B S"] | None,
        positions: Integer[Array, "B S"] | None,
    ) -> tuple[Cache, Integer[Array, "B S"], MaskSpec]:
        """(the cache whose mask knows of new tokens, their positions, which keys they may see).

        Args:
          tokens: the next of each row.
          mask: 0 or False where one is padding. None: nothing is.
          positions: of the tokens. None: padding apart, they count on.

        Raises:
          UserError: rows of another number, or more tokens than places; how many are filled is only known outside of ``jit``.
        """
        (rows, count), have = tokens.shape, self.mask.shape[0]
        if rows != have:
            raise UserError(f"cache of {have} rows, tokens of {rows}: make it with init_cache(model, {rows}, length)")
        filled = 0 if isinstance(self.filled, jax.core.Tracer) else int(self.filled)
        if filled + count > self.length:
            there = f"{self.length} places" + (f", {filled} of them filled" if filled else "")
            raise UserError(f"cache of {there}: no room for {count} tokens; make a longer one with init_cache")
        real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        if positions is None:
            before = self.mask.sum(-1, keepdims=True, dtype=jnp.int32)
            positions = jnp.maximum(before + jnp.cumsum(real, -1, dtype=jnp.int32) - 1, 0)
        seen = jax.lax.dynamic_update_slice_in_dim(self.mask, real, self.filled, 1)
        spec = MaskSpec(seen, causal=True, first=self.filled)
        return dataclasses.replace(self, mask=seen), positions, spec

    def with_room(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """``x`` of new tokens, NaN if there is no room for them: what is not known before the program runs."""
        return jnp.where(self.filled + x.shape[1] <= self.length, x, jnp.nan)

    def without_gaps(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """``x`` of new tokens, NaN in rows with padding between tokens, where windows would count it: prompts are padded in front.

        Raises:
          UserError: there is such a row, outside of ``jit``.
        """
        first, last = self.mask.argmax(-1), self.length - 1 - self.mask[:, ::-1].argmax(-1)
        apart = self.mask.any(-1) & (last - first + 1 != self.mask.sum(-1))
        if isinstance(apart, jax.core.Tracer):
            return jnp.where(apart[:, None, None], jnp.nan, x)
        if apart.any():
            raise UserError(
                f"cache: row {int(apart.argmax())} has padding between its tokens, which the windows of this model's layers would "
                "count: pad prompts in front"
            )
        return x

    def extended(self, keys: Float[Array, "L B K S H"], values: Float[Array, "L B K S H"]) -> Cache:
        """With those of new tokens, at the places after the filled ones. In place where the cache is donated."""
        at = (0, 0, 0, self.filled, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys.astype(self.keys.dtype), at),
            values=jax.lax.dynamic_update_slice(self.values, values.astype(self.values.dtype), at),
            filled=self.filled + keys.shape[3],
        )


def init_cache(model: Model, rows: int, length: int, dtype: DTypeLike | None = None) -> Cache:
    """An empty cache.

    Args:
      model: a decoder, or an encoder-decoder.
      rows: of a batch, B.
      length: tokens that a row may come to, padding included, T.
      dtype: of keys and values; None: that of the model's activations.

    Raises:
      UserError: the model has none, or cannot read so many tokens.
    """
    facts = model.facts
    if not facts.writes:
        raise UserError(f"{type(model).__module__} keeps no cache: its tokens look at those behind them too")
    if facts.limit is not None and length > facts.limit:
        raise UserError(f"cache of {length} places is beyond the model's limit of {facts.limit} positions")
    stack = facts.stacks[-1]
    shape = (stack.layers, rows, stack.key_heads, length, stack.head_size)
    dtype = model.compute.activation_dtype if dtype is None else dtype
    # Arrays of their own each: a program that is given the cache to overwrite wants none twice.
    keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return Cache(keys, values, jnp.zeros((rows, length), bool), jnp.zeros((), jnp.int32))
