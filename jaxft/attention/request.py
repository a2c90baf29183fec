"""What a call asks of a backend, and what a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxft.attention.dropout import Dropout
from jaxft.attention.mask import MaskSpec
from jaxft.attention.scores import Call


@dataclass(frozen=True)
class Request:
    """The static facts of a call of :func:`jaxft.attention.attend`."""

    platform: str
    """``cpu``, ``gpu`` or ``tpu``."""
    length: int
    heads: int
    key_heads: int
    size: int
    """Of a head."""
    operands: str
    """Type of matmul operands."""
    padding: bool = False
    segments: bool = False
    causal: bool = False
    window: int | None = None
    soft_cap: bool = False
    bias: bool = False
    dropout: str | None = None
    """Where the bits come from: ``threefry`` or ``hash``."""
    devices: int = 1
    context: int = 1
    """Ways in which rows are split."""
    split_alike: bool = True
    """Whether query and key heads are split over the same devices."""
    split_evenly: bool = True
    """Whether rows and heads divide by the devices they are split over."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    run: Callable[..., jax.Array]
    """``run(call, q, k, v, mask, bias, drop)``, as the backends of this package."""
    refuses: Callable[[Request], str | None]
    """What of a request it cannot honour, as the end of a sentence that begins with its name; None: it honours all."""


def first_of(*reasons: tuple[bool, str]) -> str | None:
    """The first reason whose condition holds."""
    return next((reason for holds, reason in reasons if holds), None)


def whole_rows(request: Request) -> str | None:
    """The reason of backends that need each row on one device."""
    return first_of((request.context > 1, "needs whole rows on a device, and the mesh splits them over context"))


def each_device(request: Request) -> str | None:
    """The reason of backends that compute each device's own rows and heads."""
    return whole_rows(request) or first_of(
        (not request.split_alike, "needs query and key heads split over the same mesh axes"),
        (not request.split_evenly, "needs rows and heads that divide by the devices they are split over"),
        (request.bias, "adds no bias"),
    )


Run = Callable[[Call, jax.Array, jax.Array, jax.Array, MaskSpec, Dropout | None], jax.Array]
