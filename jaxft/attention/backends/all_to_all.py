"""Backend ``all_to_all``: rows whose length is split over devices become whole for a part of the heads, and back (Jacobs et al.
2023, "Ulysses").

Each device sends the others what they need of its stretch and gets whole rows of N / ways heads, on which any backend for whole
rows can work. Fewer exchanges than the ring where heads are enough; the ring has no need of heads.

Dims: B batch, S query length, N query heads, K key/value heads, H head size; s a stretch of a row.
"""

from __future__ import annotations

import dataclasses

import jax
from jax import lax

from jaxft.attention.backends.scores import Call
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.attention.request import Request, Run, first_of, same_tokens
from jaxft.parallel.sharding import CONTEXT

Array = jax.Array


def all_to_all_refuses(request: Request) -> str | None:
    """See :class:`jaxft.attention.request.Backend`."""
    ways = request.context * request.heads_split
    reason = first_of(
        (request.context == 1, "needs a mesh that splits rows over context"),
        (not request.split_alike, "needs query and key heads split over the same mesh axes"),
        (not request.split_evenly, "needs rows, lengths and heads that divide by the devices they are split over"),
        (request.bias, "adds no bias"),
        (
            request.heads % ways != 0 or request.key_heads % ways != 0,
            f"needs query and key heads ({request.heads} and {request.key_heads}) that divide by context x the ways heads "
            f"are split ({ways})",
        ),
    )
    return reason or same_tokens(request)


def with_whole_rows(run: Run, call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """``run`` on whole rows of this device's share of its heads: [B, N, s, H] to [B, N, s, H]. Inside a shard_map."""
    ways, me = lax.axis_size(CONTEXT), lax.axis_index(CONTEXT)

    def whole(x: Array) -> Array:
        return lax.all_to_all(x, CONTEXT, split_axis=1, concat_axis=2, tiled=True)

    mask = jax.tree.map(lambda x: lax.all_gather(x, CONTEXT, axis=1, tiled=True), mask)
    if drop is not None:
        heads = drop.rows.shape[1] // ways
        drop = dataclasses.replace(drop, rows=lax.dynamic_slice_in_dim(drop.rows, me * heads, heads, 1))
    out = run(call, whole(q), whole(k), whole(v), mask, drop)
    return lax.all_to_all(out, CONTEXT, split_axis=2, concat_axis=1, tiled=True)
