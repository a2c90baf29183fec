"""Cross-entropy over a large vocabulary, a tile at a time: logits of all entries are never held together.

Dims: B batch, M predicted tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32, Int32, Integer

from jaxft.errors import UserError
from jaxft.layers.compute import Compute
from jaxft.layers.matmul import dot, einsum
from jaxft.layers.promotion import usual_promotion
from jaxft.parallel.sharding import run_mesh, ways

Array = jax.Array
_NEVER = np.float32(-1e30)
_NAMES = ("vocab", "embed")


class TokenScore(NamedTuple):
    """What a loss needs of the logits of some tokens."""

    loss: Float32[Array, "B M"]
    """-log softmax(logits)[target]."""
    best: Int32[Array, "B M"]
    """The entry with the largest logit."""
    normaliser: Float32[Array, "B M"]
    """log sum exp of the logits."""


def vocabulary_logits(
    x: Float[Array, "B M D"],
    table: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    compute: Compute,
    place: str,
    soft_cap: float | None = None,
) -> Float32[Array, "B M V"]:
    """The logits of a vocabulary in float32, ``x`` times ``table`` plus ``bias``, split over devices by vocabulary.

    Args:
      place: the logical name of M: ``length`` or ``predicted``.
      soft_cap: logits l become soft_cap tanh(l / soft_cap).
    """
    table, size = compute.rules.place_gradient(table, *_NAMES), table.shape[0]
    logits = einsum("bmd,vd->bmv", x, _aligned(table, compute), compute, _NAMES)[..., :size]
    logits = compute.rules.constrain(logits, "batch", place, "act_vocab").astype(jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return _capped(logits, soft_cap)


def _capped(logits: Array, soft_cap: float | None) -> Array:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


_ALIGNED = 1024


def _aligned(table: Array, compute: Compute) -> Array:
    """``table``, on TPUs that split its width with as many rows of zeros as make their number a multiple of 1024.

    With other numbers, libtpu (0.0.52) sums up the gradient whole on each device instead of scattering it.
    """
    rules, mesh = compute.rules, run_mesh()
    if compute.platform != "tpu" or mesh is None:
        return table
    if ways(mesh, rules, "embed") == 1 or ways(mesh, rules, "vocab") > 1:
        return table
    padded = jnp.pad(table, ((0, -table.shape[0] % _ALIGNED), (0, 0)))
    return rules.place_gradient(_gradient_apart(padded), *_NAMES)


@jax.custom_vjp
def _gradient_apart(x: Array) -> Array:
    return x


# Without the barrier, the zeros are cut off before the sum is scattered.
_gradient_apart.defvjp(lambda x: (x, None), lambda kept, g: (lax.optimization_barrier(g),))


def score_tokens(
    x: Float[Array, "B M D"],
    table: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    targets: Integer[Array, "B M"],
    compute: Compute,
    soft_cap: float | None = None,
) -> TokenScore:
    """Loss and best guess of each token, ``compute.vocab_tile`` entries at a time, forwards and backwards.

    The backward pass computes each tile's logits again. Costs one more product with the table than logits held at once,
    and B M V fewer numbers.

    Args:
      targets: the entry that stands at each place.
      soft_cap: logits l become soft_cap tanh(l / soft_cap).

    Raises:
      UserError: the vocabulary is split over devices, whose parts a tile would have to gather.
    """
    assert compute.vocab_tile is not None
    mesh = run_mesh()
    parts = 1 if mesh is None else ways(mesh, compute.rules, "vocab")
    if parts > 1:
        raise UserError(
            f"model.vocab_tile={compute.vocab_tile}: the mesh splits the vocabulary {parts} ways already (mesh.tensor); "
            "leave one of them out"
        )
    bias = jnp.zeros(table.shape[0], jnp.float32) if bias is None else bias
    return TokenScore(*_scored(compute, soft_cap, x, table, bias, targets))


def _tiles(compute: Compute, table: Array, bias: Array) -> tuple[Array, Array, Array]:
    """(first entry of each tile [n], table [n, tile, D], bias [n, tile]); what is beyond V never wins."""
    v, d = table.shape
    tile = min(compute.vocab_tile or v, v)
    n = -(-v // tile)
    rows = jnp.pad(table, ((0, n * tile - v), (0, 0))).reshape(n, tile, d)
    offsets = jnp.pad(bias.astype(jnp.float32), (0, n * tile - v), constant_values=_NEVER).reshape(n, tile)
    return jnp.arange(n, dtype=jnp.int32) * tile, rows, offsets


def _of_tile(compute: Compute, soft_cap: float | None, x: Array, rows: Array, offsets: Array) -> Array:
    """Logits of one tile."""
    logits = dot("bmd,vd->bmv", x, rows, compute, _NAMES)
    if soft_cap is None:
        return logits + offsets
    return jnp.where(offsets > 0.5 * _NEVER, _capped(logits + offsets, soft_cap), _NEVER)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scored(
    compute: Compute, soft_cap: float | None, x: Array, table: Array, bias: Array, targets: Array
) -> tuple[Array, Array, Array]:
    return _scored_fwd(compute, soft_cap, x, table, bias, targets)[0]


def _scored_fwd(
    compute: Compute, soft_cap: float | None, x: Array, table: Array, bias: Array, targets: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    def add(so_far: tuple[Array, ...], tile: tuple[Array, Array, Array]) -> tuple[tuple[Array, ...], None]:
        top, total, of_target, best = so_far
        first, rows, offsets = tile
        logits = _of_tile(compute, soft_cap, x, rows, offsets)
        here = logits.max(-1)
        best = jnp.where(here > top, first + logits.argmax(-1).astype(jnp.int32), best)
        new_top = jnp.maximum(top, here)
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
        hit = jnp.arange(rows.shape[0]) == (targets - first)[..., None]
        return (new_top, total, of_target + jnp.where(hit, logits, 0.0).sum(-1), best), None

    shape = targets.shape
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))
    (top, total, of_target, best), _ = lax.scan(add, start, _tiles(compute, table, bias))
    normaliser = top + jnp.log(total)
    return (normaliser - of_target, best, normaliser), (x, table, bias, targets, normaliser)


def _scored_bwd(
    compute: Compute, soft_cap: float | None, kept: tuple[Array, ...], g: tuple[Array, Array, Array]
) -> tuple[Array | None, ...]:
    x, table, bias, targets, normaliser = kept
    of_loss, of_normaliser = g[0][..., None], g[2][..., None]

    def add(dx: Array, tile: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        first, rows, offsets = tile
        logits = _of_tile(compute, soft_cap, x, rows, offsets)
        hit = jnp.arange(rows.shape[0]) == (targets - first)[..., None]
        shares = jnp.exp(logits - normaliser[..., None])
        dlogits = (shares - hit) * of_loss + shares * of_normaliser
        if soft_cap is not None:  # places beyond the vocabulary have no gradient before it either
            dlogits = dlogits * jnp.maximum(1.0 - jnp.square(logits / soft_cap), 0.0)
        dx = dx + dot("bmv,vd->bmd", dlogits, rows, compute, _NAMES)
        return dx, (dot("bmv,bmd->vd", dlogits, x, compute), dlogits.sum((0, 1)))

    dx, (drows, doffsets) = lax.scan(add, jnp.zeros(x.shape, jnp.float32), _tiles(compute, table, bias))
    v, d = table.shape
    dtable = drows.reshape(-1, d)[:v].astype(table.dtype)
    return dx.astype(x.dtype), dtable, doffsets.reshape(-1)[:v].astype(bias.dtype), None


_scored.defvjp(usual_promotion(_scored_fwd), usual_promotion(_scored_bwd))
