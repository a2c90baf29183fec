"""Parts of layers that several families share: attention with rotary positions, and gated MLPs.

Dims: B batch, S length, D model width, N query heads, K key/value heads, H head size, F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
from jaxtyping import Float, Integer, PRNGKeyArray

from jaxft.attention import MaskSpec, attend, tokens_last
from jaxft.layers import (
    ACTIVATIONS,
    Compute,
    FromHeads,
    Initializer,
    Linear,
    Projection,
    Rate,
    RMSNorm,
    Rotary,
    dropout,
    project,
    project_together,
    rotate,
    rows_of,
)

Array = jax.Array


KeysAndValues = tuple[Float[Array, "B K _ H"], Float[Array, "B K _ H"]]
"""Keys and values of the tokens of a call, or of all places of a cache."""


@dataclass(frozen=True)
class QueryKeyNorm:
    """RMS norms of queries and keys, before they are turned."""

    eps: float
    whole: bool = False
    """Over all heads of a token together, with a scale of each; if not, over each head, with one scale for all of them."""
    zero_centred: bool = False
    """The same in :class:`~jaxft.layers.RMSNorm`."""

    def __call__(self, name: str, y: Float[Array, "B N S H"], compute: Compute) -> Float[Array, "B N S H"]:
        """Declared on the module whose method calls it."""
        norm = RMSNorm(self.eps, compute, self.zero_centred, name=name)
        if not self.whole:
            return norm(y)
        b, n, s, h = y.shape
        return norm(y.transpose(0, 2, 1, 3).reshape(b, s, n * h)).reshape(b, s, n, h).transpose(0, 2, 1, 3)


class RotaryAttention(nn.Module):
    """Grouped-query self-attention with rotary positions, [B, S, D] to [B, S, D]; and to what tokens that follow need of these."""

    heads: int
    key_heads: int
    head_size: int
    compute: Compute
    initial: Initializer
    out_initial: Initializer
    """Initialiser of the map from heads back to the width."""
    rate: Rate = 0.0
    """Dropout of probabilities."""
    biased: bool = False
    together: bool = False
    """Queries, keys and values are one wide product where that is faster; they have the same number of heads then."""
    out_biased: bool | None = None
    """Whether the map back to the width has a bias; None: as the others."""
    norm: QueryKeyNorm | None = None
    scale: float | None = None
    """What products of queries and keys are multiplied with; None: 1 / sqrt(head size)."""
    soft_cap: float | None = None
    """The same in :func:`~jaxft.attention.attend`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: MaskSpec,
        positions: Integer[Array, "B S"],
        key: PRNGKeyArray | None,
        rope: Rotary | None,
        past: KeysAndValues | None = None,
    ) -> tuple[Float[Array, "B S D"], KeysAndValues | None]:
        """(the result, keys and values of these tokens; None where there is no past).

        Args:
          mask: which key each token may see; those of ``past``, if there is one, with these at place ``mask.first``.
          positions: of the tokens.
          key: dropout key; None: no dropout.
          rope: None: queries and keys are not turned.
          past: keys and values of a cache with room for these.
        """
        rules, (b, s, d), h = self.compute.rules, x.shape, self.head_size
        shape, drops = (b, self.heads, s, h), key is not None and self.rate > 0.0
        last = past is None and tokens_last(shape, self.key_heads, mask, self.compute, drops, self.soft_cap)
        last = last and self.norm is None  # norms are over the last axis

        def projection(name: str) -> tuple[Array, Array | None]:
            count, names = self._split(name)
            return Projection((d, count, h), names, self.compute, self.initial, self.biased, name=name)()

        def placed(name: str, y: Array) -> Array:
            if name != "value":
                y = y if self.norm is None else self.norm(f"{name}_norm", y, self.compute)
                y = y if rope is None else rotate(y, positions, rope, last)
            act_name = "act_heads" if self._split(name)[1][1] == "heads" else "act_kv_heads"
            return rules.constrain(rows_of(y, b) if last else y, "batch", act_name, "length", None)

        parts = ("query", "key", "value")
        if self.together and not last:
            names = self._split("query")[1]
            made = project_together(x, [projection(name) for name in parts], names, self.compute)
            q, k, v = (placed(name, y) for name, y in zip(parts, made, strict=True))
        else:
            q, k, v = (
                placed(name, project(x, projection(name), self._split(name)[1], self.compute, last)) for name in parts
            )
        new = None
        if past is not None:
            new = (k.astype(past[0].dtype), v.astype(past[1].dtype))
            k, v = (jax.lax.dynamic_update_slice_in_dim(*pair, mask.first, 2) for pair in zip(past, new, strict=True))
        mixed = attend(q, k, v, mask, self.compute, self.rate, key, scale=self.scale, soft_cap=self.soft_cap)
        places, biased = ("heads", None, "embed"), self.biased if self.out_biased is None else self.out_biased
        out = FromHeads((self.heads, h, d), places, self.compute, self.out_initial, biased, name="out")
        return out(mixed, last), new

    def _split(self, name: str) -> tuple[int, tuple[str, str, None]]:
        """How many heads there are, and the logical axes of the kernel that makes them."""
        if name == "query" or self.together:
            return self.heads, ("embed", "heads", None)
        return self.key_heads, ("embed", "kv_heads", None)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020), [B, S, D] to [B, S, D]."""

    width: int
    """The hidden width, F."""
    act: str
    compute: Compute
    initial: Initializer
    down_initial: Initializer
    biased: bool = False
    rate: Rate = 0.0
    """Dropout of the product."""
    down_biased: bool | None = None
    """Whether ``down`` has a bias; None: as the others."""

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], key: PRNGKeyArray | None = None) -> Float[Array, "B S D"]:
        rules, d, f = self.compute.rules, x.shape[-1], self.width
        act = ACTIVATIONS[self.act]

        def wide(name: str) -> Array:
            y = Linear((d, f), ("embed", "mlp"), self.compute, self.initial, biased=self.biased, name=name)(x)
            return rules.constrain(y, "batch", "length", "act_mlp")

        def gated(pair: tuple[Array, Array]) -> Array:
            return act(pair[0]) * pair[1]

        pair, drops = (wide("gate"), wide("up")), key is not None and self.rate > 0.0
        # Without dropout, the product is made again in the backward pass; what is dropped of it is kept.
        inner = dropout(gated(pair), self.rate, key, self.compute.dropout_bits) if drops else pair
        biased = self.biased if self.down_biased is None else self.down_biased
        return Linear(
            (f, d), ("mlp", "embed"), self.compute, self.down_initial, biased=biased,
            act=None if drops else gated, name="down",
        )(inner)  # fmt: skip
