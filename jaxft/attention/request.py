"""What a call asks of a backend, and what a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxft.attention.backends.scores import Call
from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.attention.placed import heads_split, split_alike, split_evenly
from jaxft.parallel.sharding import CONTEXT, run_mesh

Run = Callable[[Call, jax.Array, jax.Array, jax.Array, MaskSpec, Dropout | None], jax.Array]


@dataclass(frozen=True)
class Request:
    """The static facts of a call of :func:`jaxft.attention.attend`."""

    platform: str
    """``cpu``, ``gpu`` or ``tpu``."""
    length: int
    heads: int
    key_heads: int
    size: int
    """Head size, H."""
    operands: str
    """Type of matmul operands."""
    device: str | None = None
    """Its kind, as jax names it; None: unknown."""
    padding: bool = False
    segments: bool = False
    causal: bool = False
    window: int | None = None
    soft_cap: bool = False
    bias: bool = False
    dropout: str | None = None
    """Where the bits come from: ``threefry`` or ``hash``."""
    context: int = 1
    """Ways in which rows are split."""
    split_alike: bool = True
    """Whether query and key heads are split over the same devices."""
    split_evenly: bool = True
    """Whether rows and heads divide by the devices they are split over."""
    heads_split: int = 1
    """Ways in which heads are split."""
    key_length: int | None = None
    """T, where it is not ``length``."""
    key_segments: bool = False
    """Whether the segments of keys are given apart from those of queries."""
    shifted: bool = False
    """Whether queries stand elsewhere than at the first keys."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    run: Callable[..., jax.Array]
    """``run(call, q, k, v, mask, bias, drop)``, of arrays as a mesh has them."""
    refuses: Callable[[Request], str | None]
    """Reason for refusing a request, as the end of a sentence that begins with the backend's name; None: it takes the request."""
    local: Run | None = None
    """``local(call, q, k, v, mask, drop)`` of one device's rows and heads, in backends that are made of it."""
    tokens_last: Callable[[Request], bool] = lambda request: False
    """Whether it reads and writes heads as [N, H, B S]: other layouts cost a pass over memory each."""


def request_of(
    call: Call,
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    mask: MaskSpec,
    bias: jax.Array | None,
    bits: str | None,
    *,
    local: bool = False,
) -> Request:
    """The request of a call under the current mesh.

    Args:
      bits: where those of dropout come from; None: no dropout.
      local: of one device's arrays, whatever the mesh.
    """
    rules, mesh = call.compute.rules, None if local else run_mesh()
    split = mesh is not None
    return Request(
        platform=call.compute.platform or jax.default_backend(),
        length=q.shape[2],
        heads=q.shape[1],
        key_heads=k.shape[1],
        size=q.shape[3],
        operands=call.compute.matmul_dtype,
        device=call.compute.device,
        padding=mask.padding is not None,
        segments=mask.segments is not None,
        causal=mask.causal,
        window=mask.window,
        soft_cap=call.soft_cap is not None,
        bias=bias is not None,
        dropout=bits,
        context=1 if mesh is None else mesh.shape[CONTEXT],
        split_alike=not split or split_alike(rules),
        split_evenly=not split or split_evenly(rules, q, k),
        heads_split=heads_split(rules) if split else 1,
        key_length=None if k.shape[2] == q.shape[2] else k.shape[2],
        key_segments=mask.key_segments is not None,
        shifted=mask.shifted,
    )


def first_of(*reasons: tuple[bool, str]) -> str | None:
    """The first reason whose condition holds."""
    return next((reason for holds, reason in reasons if holds), None)


def whole_rows(request: Request) -> str | None:
    """The reason of backends that need each row on one device."""
    return first_of((request.context > 1, "needs whole rows on a device, and the mesh splits them over context"))


def same_tokens(request: Request) -> str | None:
    """The reason of backends whose queries and keys are made of the same tokens."""
    return first_of(
        (request.key_length is not None, "needs as many keys as queries"),
        (request.key_segments, "knows one kind of segments, for queries and keys"),
    ) or unshifted(request)


def unshifted(request: Request) -> str | None:
    """The reason of backends that cannot be told where queries stand."""
    return first_of((request.shifted, "needs the first query to stand at the first key"))


def each_device(request: Request) -> str | None:
    """The reason of backends that compute each device's own rows and heads."""
    return whole_rows(request) or first_of(
        (not request.split_alike, "needs query and key heads split over the same mesh axes"),
        (not request.split_evenly, "needs rows and heads that divide by the devices they are split over"),
        (request.bias, "adds no bias"),
    )
