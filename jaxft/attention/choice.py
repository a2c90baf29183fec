"""Which backend computes a call: the one asked for, or the fastest measured one that honours it."""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypedDict

import jax

from jaxft.attention import native
from jaxft.attention.backends import blockwise, dense, library, reference, ring
from jaxft.attention.backends.all_to_all import all_to_all_refuses, with_whole_rows
from jaxft.attention.backends.scores import Call
from jaxft.attention.dropout import Dropout
from jaxft.attention.fused import tpu
from jaxft.attention.mask import MaskSpec
from jaxft.attention.placed import on_each_device
from jaxft.attention.request import Backend, Request, Run, each_device, first_of, request_of, same_tokens, whole_rows
from jaxft.errors import UserError, nearest

Array = jax.Array


def _placed(run: Run) -> Callable[..., Array]:
    def placed(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, bias: None, drop: Dropout | None) -> Array:
        return on_each_device(call.compute.rules, functools.partial(run, call), q, k, v, mask, drop)

    return placed


def _local(
    name: str,
    run: Run,
    refuses: Callable[[Request], str | None],
    *,
    tokens_last: Callable[[Request], bool] = lambda request: False,
) -> Backend:
    return Backend(name, _placed(run), refuses, run, tokens_last)


def _all_to_all(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, bias: None, drop: Dropout | None) -> Array:
    return on_each_device(
        call.compute.rules, functools.partial(with_whole_rows, _best_local, call), q, k, v, mask, drop
    )


def _best_local(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, drop: Dropout | None) -> Array:
    """Whole rows, by the fastest backend for one device."""
    request = request_of(call, q, k, mask, None, None if drop is None else drop.bits, local=True)
    able = [b for b in BACKENDS if b.local is not None and b.name not in _ONLY_ASKED and b.refuses(request) is None]
    backend = _fastest(request, able).backend
    assert backend.local is not None
    return backend.local(call, q, k, v, mask, drop)


def _ring(call: Call, q: Array, k: Array, v: Array, mask: MaskSpec, bias: None, drop: Dropout | None) -> Array:
    return ring.ring(call, q, k, v, mask, drop)


def _ring_refuses(request: Request) -> str | None:
    return first_of(
        (request.context == 1, "needs a mesh that splits rows over context"),
        (not request.split_alike, "needs query and key heads split over the same mesh axes"),
        (not request.split_evenly, "needs rows, lengths and heads that divide by the devices they are split over"),
        (request.bias, "adds no bias"),
    ) or same_tokens(request)


def _dense_refuses(request: Request) -> str | None:
    # Where rows are split, each device's queries meet all keys. Others need less memory; none of them adds a bias.
    return None if request.bias else whole_rows(request)


# In the order of preference where nothing was measured.
BACKENDS = (
    Backend("ring", _ring, _ring_refuses),
    Backend("all_to_all", _all_to_all, all_to_all_refuses),
    _local("fused", tpu.fused, tpu.fused_refuses, tokens_last=tpu.fused_tokens_last),
    _local("splash", tpu.splash, tpu.splash_refuses),
    _local("flash", tpu.flash, tpu.flash_refuses),
    _local("cudnn", library.cudnn, library.cudnn_refuses),
    _local("native", native.native, native.native_refuses),
    _local("blockwise", blockwise.blockwise, each_device),
    Backend("xla", dense.dense, _dense_refuses),
    Backend("jax", library.jax_attention, library.jax_refuses),
    _local("tokamax", library.tokamax, library.tokamax_refuses),
    Backend("reference", reference.reference, whole_rows),
)
NAMES = tuple(backend.name for backend in BACKENDS)
_ONLY_ASKED = ("reference", "tokamax")  # never chosen: slow, or chooses by itself


@dataclass(frozen=True)
class Choice:
    """A backend, and why."""

    backend: Backend
    request: Request
    why: str
    wanted: str = "auto"
    """What was asked for: a name, or ``auto``."""


def choose(request: Request, wanted: str = "auto") -> Choice:
    """The backend for a request.

    Raises:
      UserError: an unknown name, or a backend that cannot honour the request; says which can.
    """
    if wanted != "auto":
        return Choice(_asked(request, wanted), request, "asked for", wanted)
    able = [b for b in BACKENDS if b.name not in _ONLY_ASKED and b.refuses(request) is None]
    if not able:
        raise UserError(f"attention: no backend can do this: {_reasons(request)}")
    return _fastest(request, able)


def _fastest(request: Request, able: list[Backend]) -> Choice:
    if len(able) == 1:
        return Choice(able[0], request, "the only one that can")
    row = _nearest_row(request)
    timed = {} if row is None else row["ms"]
    measured = [b for b in able if b.name in timed]
    if row is None or not measured:
        return Choice(able[0], request, "first of those that can: nothing was measured for it")
    best = min(measured, key=lambda b: timed[b.name])
    return Choice(best, request, f"fastest of {', '.join(b.name for b in measured)} at {row['length']} tokens")


def _asked(request: Request, wanted: str) -> Backend:
    backend = next((b for b in BACKENDS if b.name == wanted), None)
    if backend is None:
        raise UserError(f"model.attention={wanted!r}: unknown backend: {nearest(wanted, ('auto', *NAMES))}")
    reason = backend.refuses(request)
    if reason is not None:
        able = [b.name for b in BACKENDS if b.refuses(request) is None]
        others = f"use {' or '.join(able)}, or auto" if able else f"no backend can: {_reasons(request)}"
        raise UserError(f"model.attention={wanted}: {wanted} {reason}; {others}")
    return backend


def _reasons(request: Request) -> str:
    # Where rows are split, few come into question.
    asked = [b for b in BACKENDS if request.context == 1 or b.name in ("ring", "all_to_all")]
    return "; ".join(f"{b.name} {reason}" for b in asked if (reason := b.refuses(request)) is not None)


class Measured(TypedDict):
    """A row of the table behind ``auto``."""

    platform: str
    operands: str
    size: int
    length: int
    dropout: bool
    ms: dict[str, float]
    """Per backend, forwards and backwards."""


@functools.cache
def measured() -> list[Measured]:
    """Rows of the table behind ``auto``: platform, operands, size, length, dropout, and ms per backend, forwards and backwards.

    Written by ``benchmarks/attention.py --table`` (CPU, as timed) and ``benchmarks/attention_tpu.py`` (TPU, the compiler's
    estimate).
    """
    return json.loads(importlib.resources.files("jaxft.attention").joinpath("measured.json").read_text())["rows"]


def _nearest_row(request: Request) -> Measured | None:
    """The measured case most like a request: same platform, then dropout or not, operands, length, head size."""

    length = math.sqrt(request.length * (request.key_length or request.length))

    def distance(row: Measured) -> tuple[float, ...]:
        return (
            row["dropout"] != (request.dropout is not None),
            row["operands"] != request.operands,
            abs(math.log(row["length"] / length)),
            abs(math.log(row["size"] / request.size)),
        )

    rows = [row for row in measured() if row["platform"] == request.platform]
    return min(rows, key=distance, default=None)


_seen: ContextVar[dict[Request, Choice] | None] = ContextVar("_seen", default=None)


@contextlib.contextmanager
def choices() -> Iterator[dict[Request, Choice]]:
    """Collects what was chosen by calls that are traced inside, in the same thread."""
    seen: dict[Request, Choice] = {}
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def note(choice: Choice) -> None:
    """Tells those who collect."""
    seen = _seen.get()
    if seen is not None:
        seen[choice.request] = choice


def described(seen: Iterable[Choice], wanted: str) -> str:
    """One line: ``blockwise at 16, 32 tokens (fastest of ...); ...``.

    Args:
      wanted: what the run asks for; choices of calls that asked for something else (those that only declare parameters) are
        left out.
    """
    groups: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for choice in seen:
        if choice.wanted == wanted:
            keys = choice.request.key_length
            lengths = (choice.request.length,) if keys is None else (choice.request.length, keys)
            groups.setdefault((choice.backend.name, choice.why), set()).add(lengths)
    return "; ".join(
        f"{name} at {', '.join(' x '.join(map(str, one)) for one in sorted(lengths))} tokens ({why})"
        for (name, why), lengths in groups.items()
    )
