"""Parts of DeBERTa's layers: attention that looks at contents and at distances apart (He et al. 2020), and convolutions along rows.

Dims: B batch, S length, D model width, N heads, H head size, P vectors of distances, K tokens of a convolution, G its groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxft.attention import MaskSpec, attend
from jaxft.attention.probabilities import attention_probabilities
from jaxft.attention.relative import by_distance, distances
from jaxft.errors import UserError
from jaxft.layers import (
    Compute,
    FromHeads,
    Initializer,
    LayerNorm,
    Projection,
    declare,
    dropout,
    einsum,
    project,
    project_exactly,
    project_together,
    subkey,
)
from jaxft.models.encoder import EncoderConfig
from jaxft.models.heads import exact, normal

Array = jax.Array

C2P, P2C = "c2p", "p2c"
"""Who meets vectors of distances: queries (from content to position), or keys (from position to content)."""


@dataclass(frozen=True)
class Ranges:
    """Which distances are told apart."""

    span: int
    """Vectors of distances on either side."""
    exact: int | None
    """Distances up to here have vectors of their own, farther ones by their logarithms; None: all have."""
    farthest: int
    """The distance from which on all logarithms are one."""

    def rows(self, away: np.ndarray) -> np.ndarray:
        """The row of the table of distances for each number of places that a query stands behind its key; below 0: before it."""
        half, far = self.exact, np.abs(away)
        if half is not None and far.max() > half:
            # In float32, as the reference counts: where a range ends, the last digit decides.
            logs = np.log(np.maximum(far, half).astype(np.float32) / np.float32(half))
            logs = logs / np.log(np.float32((self.farthest - 1) / half)) * np.float32(half - 1)
            away = np.where(far <= half, away, (np.ceil(logs) + half).astype(np.int32) * np.sign(away))
        return np.clip(away + self.span, 0, 2 * self.span - 1)


@dataclass(frozen=True)
class DisentangledConfig(EncoderConfig):
    """What attention of this kind adds to an encoder's Config."""

    relative_attention: bool = False
    """Whether there are vectors of distances."""
    pos_att_type: tuple[Literal["c2p", "p2c"], ...] = ()
    """Who meets them: queries (``c2p``), keys (``p2c``)."""
    share_att_key: bool = False
    """Contents and distances are mapped to heads by the same maps."""
    position_buckets: int = -1
    """Distances up to half of it are told apart, farther ones by their logarithms; below 1: all are told apart."""
    max_relative_positions: int = -1
    """From this distance on, all are one; below 1: ``max_position_embeddings``."""
    norm_rel_ebd: Literal["none", "layer_norm"] = "none"
    """Whether vectors of distances are normalised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        half = self.position_buckets // 2
        if self.position_buckets == 1 or (self.position_buckets > 1 and self.limit > half + 1 >= self.farthest):
            raise UserError(
                f"model.arch: position_buckets={self.position_buckets} of max_relative_positions={self.farthest} do not tell "
                f"far distances apart"
            )

    @property
    def farthest(self) -> int:
        """From this distance on, all are one."""
        return self.max_position_embeddings if self.max_relative_positions < 1 else self.max_relative_positions

    @property
    def ranges(self) -> Ranges | None:
        """Which distances are told apart; None: none are."""
        few = self.position_buckets if self.position_buckets > 0 else None
        found = Ranges(few or self.farthest, few and few // 2, self.farthest)
        return found if self.relative_attention else None

    @property
    def scale(self) -> float:
        """Scale of each of the products that a logit of attention is the sum of."""
        return (self.head_size * (1 + len(set(self.pos_att_type)))) ** -0.5

    def maps(self) -> dict[str, str]:
        """Who meets distances, and the projection that maps their vectors to heads for it."""
        own = {C2P: "key", P2C: "query"} if self.share_att_key else {C2P: "pos_key", P2C: "pos_query"}
        return {kind: name for kind, name in own.items() if self.relative_attention and kind in self.pos_att_type}


class Distances(nn.Module):
    """Vectors of distances [P, D], normalised if asked for; None where there are none."""

    ranges: Ranges | None
    width: int
    eps: float | None
    """Epsilon of the norm; None: there is no norm."""
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self) -> Array | None:
        table, how = None, self.compute
        if self.ranges is not None:
            shape = (2 * self.ranges.span, self.width)
            table = declare(self, "embedding", self.initial, ("positions", "embed"), shape, how.param_dtype)
            table = table.astype(how.activation_dtype)
        if self.eps is None:
            return table
        normalised = LayerNorm(self.eps, how, name="norm")(jnp.zeros((1, self.width)) if table is None else table)
        return None if table is None else normalised  # the reference has the norm without distances, too


def distance_bias(
    q: Array, k: Array, met: Mapping[str, Array], ranges: Ranges, scale: float, compute: Compute
) -> Array | None:
    """What distances add to the logits of attention, [B, N, S, S] float32; None: nothing.

    Args:
      q, k: [B, N, S, H].
      met: vectors of distances as heads [1, N, P, H], by who meets them.
      scale: of the products.
    """
    away, wide, total = distances(q.shape[2]), dataclasses.replace(compute, activation_dtype="float32"), None
    for kind, vectors in met.items():
        # What is behind a query is before its key.
        rows, content = (ranges.rows(-away), q) if kind == C2P else (ranges.rows(away), k)
        products = by_distance(einsum("bnsh,nph->bnsp", content, vectors[0][:, rows], wide))
        products = products if kind == C2P else products.swapaxes(2, 3)
        total = products if total is None else total + products
    return None if total is None else compute.rules.constrain(total * scale, "batch", "act_heads", "length", None)


class DisentangledAttention(nn.Module):
    """Multi-head self-attention to contents and distances, with its residual connection and norm."""

    config: DisentangledConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, mask: MaskSpec, table: Array | None, key: Array | None) -> Array:
        c, how, names = self.config, self.compute, ("embed", "heads", None)
        d, n, h = c.hidden_size, c.num_attention_heads, c.head_size
        contents = ("query", "key", "value")
        maps = {
            name: Projection((d, n, h), names, how, normal(c), name=name)()
            for name in dict.fromkeys((*contents, *c.maps().values()))
        }
        q, k, v = (
            how.rules.constrain(y, "batch", "act_heads", "length", None)
            for y in project_together(x, [maps[name] for name in contents], names, how)
        )
        bias = None
        if table is not None and c.ranges is not None:
            rows = dropout(table, c.hidden_dropout_prob, subkey(key, 2), how.dropout_bits)[None]
            met = {kind: project(rows, maps[name], names, how, False) for kind, name in c.maps().items()}
            bias = distance_bias(q, k, met, c.ranges, c.scale, how)
        rate = c.attention_probs_dropout_prob
        mixed = attend(q, k, v, mask, how, rate, subkey(key, 0), scale=c.scale, bias=bias)
        out = FromHeads((n, h, d), ("heads", None, "embed"), how, normal(c), name="out")(mixed)
        out = dropout(out, c.hidden_dropout_prob, subkey(key, 1), how.dropout_bits)
        return LayerNorm(c.layer_norm_eps, how, name="norm")(x + out)


def disentangled_attentions(
    c: DisentangledConfig, layers: PyTree[Array], states: Array, mask: MaskSpec, table: Array | None, how: Compute
) -> Array:
    """[L, B, N, S, S] float32, from the layers' stacked parameters and what went into each."""

    def looked(number: int) -> Array:
        def heads(x: Array, name: str) -> Array:
            return project_exactly(x, layers["attention"][name], number)

        (q, k), bias = (heads(states[number], name) for name in ("query", "key")), None
        if table is not None and c.ranges is not None:
            met = {kind: heads(table[None], name) for kind, name in c.maps().items()}
            bias = distance_bias(q, k, met, c.ranges, c.scale, exact(how))
        return attention_probabilities(q, k, mask, bias, c.scale)

    return jnp.stack([looked(number) for number in range(c.num_hidden_layers)])


class Kernel(NamedTuple):
    """The parameters of a convolution along rows."""

    weight: Array
    """[K, G, D / G, D / G], from inputs to outputs."""
    bias: Array
    """[D]."""
    scale: Array
    """Parameter of the norm behind it, [D]."""
    shift: Array
    """Likewise."""


class Convolution(nn.Module):
    """Declares a convolution and the norm behind it."""

    taps: int
    groups: int
    width: int
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self) -> Kernel:
        dtype, width = self.compute.param_dtype, self.width // self.groups
        zeros, ones, of_norm = nn.initializers.zeros, nn.initializers.ones, (("norm",), (self.width,), dtype)
        shape, names = (self.taps, self.groups, width, width), (None, None, "embed", "pooled")
        return Kernel(
            declare(self, "kernel", self.initial, names, shape, dtype),
            declare(self, "bias", zeros, ("pooled",), (self.width,), dtype),
            declare(self, "scale", ones, *of_norm),
            declare(self, "shift", zeros, *of_norm),
        )


def convolved(x: Array, kernel: Kernel, segments: Array | None, compute: Compute) -> Array:
    """The convolution of ``x`` [B, S, D], 0 being beyond both ends of a row, and of a text where ``segments`` [B, S] say which token is
    of which."""
    (taps, groups), (b, s, d) = kernel.weight.shape[:2], x.shape
    half = taps // 2

    def shifted(array: Array, places: int) -> Array:
        wide = jnp.pad(array, [(0, 0), (half, half), *[(0, 0)] * (array.ndim - 2)])
        return jax.lax.slice_in_dim(wide, half + places, half + places + s, axis=1)

    parts = []
    for places in range(-half, half + 1):
        part = shifted(x, places)
        if segments is not None and places:
            part = jnp.where((shifted(segments, places) == segments)[..., None], part, 0)
        parts.append(part.reshape(b, s, groups, d // groups))
    names = (None, None, "embed", "pooled")
    out = einsum("bskgi,kgio->bsgo", jnp.stack(parts, 2), kernel.weight, compute, names).reshape(b, s, d)
    return out + kernel.bias.astype(out.dtype)
