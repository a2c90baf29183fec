"""Queries and keys of different length: every backend that takes them against float64 and torch; the others refuse."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.attention import NAMES, MaskSpec, attend, choose
from jaxft.attention.backends import blockwise
from jaxft.attention.choice import BACKENDS
from jaxft.attention.request import Request
from jaxft.config import MeshConfig
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.parallel.sharding import make_mesh

from .cases import HEADS, NATIVE
from .exact import Truth

LENGTHS = {"few": (13, 61), "many": (61, 13), "one_query": (1, 50), "one_key": (21, 1), "same": (40, 40)}
HIDDEN = ("none", "padding", "segments", "both")
BY_ROW = jnp.asarray([11, 30], jnp.int32)
PLACES: dict[str, dict[str, Any]] = {
    "bidirectional": {},
    "causal": {"causal": True},
    "causal_at": {"causal": True, "first": 9},
    "causal_by_row": {"causal": True, "first": BY_ROW},
    "window_at": {"window": 6, "first": 12},
    "causal_window_by_row": {"causal": True, "window": 8, "first": BY_ROW},
    "causal_window_before": {"causal": True, "window": 8, "first": -4},
}
SIZE = 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_BLOCK", 16)
    monkeypatch.setattr(blockwise, "_LOGITS", {"cpu": 2000})


def mask_of(lengths: tuple[int, int], hidden: str, place: str) -> MaskSpec:
    s, t = lengths
    rng = np.random.default_rng([s, t])
    real = jnp.asarray(np.arange(t) < np.asarray([[t], [max(1, t - 7)]]))
    parts: dict[str, Any] = {}
    if hidden in ("padding", "both"):
        parts["padding"] = real
    if hidden in ("segments", "both"):
        parts["segments"] = jnp.asarray(rng.integers(0, 4, (2, s)), jnp.int32)
        parts["key_segments"] = jnp.asarray(rng.integers(0, 3, (2, t)), jnp.int32)
    return MaskSpec(**parts, **PLACES[place])


def seen_of(lengths: tuple[int, int], mask: MaskSpec) -> np.ndarray:
    """[B, 1, S, T] bool, from the words of the contract, one query and one key at a time."""
    s, t = lengths
    seen = np.ones((2, 1, s, t), bool)
    first = np.broadcast_to(np.asarray(mask.first), (2,))
    for b, _, i, j in np.ndindex(*seen.shape):
        place = int(first[b]) + i
        some = [mask.padding is None or bool(mask.padding[b, j])]
        if mask.segments is not None and mask.key_segments is not None:
            some += [int(mask.segments[b, i]) == int(mask.key_segments[b, j]) != 0]
        some += [not mask.causal or j <= place, mask.window is None or abs(place - j) < mask.window]
        seen[b, 0, i, j] = all(some)
    return seen


def arrays_of(lengths: tuple[int, int], heads: tuple[int, int] = (4, 2)) -> list[Any]:
    """q, k, v and a cotangent, of whole numbers."""
    (s, t), (n, k), rng = lengths, heads, np.random.default_rng(lengths)
    shapes = [(2, n, s, SIZE), (2, k, t, SIZE), (2, k, t, SIZE), (2, n, s, SIZE)]
    return [rng.integers(-2, 3, shape).astype(np.float32) for shape in shapes]


def passes(backend: str, arrays: list[Any], mask: MaskSpec, rate: float = 0.0, **settings: Any) -> list[Any]:
    """Output and gradients; the mask is an argument of the program, or ``first`` would be known where it is an array."""

    def run(q: Any, k: Any, v: Any, g: Any, mask: MaskSpec) -> Any:
        compute = Compute(attention=backend, **settings)
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, compute, rate, jax.random.key(3)), q, k, v)
        return out, *vjp(g)

    return list(jax.jit(run)(*arrays, mask))


def cells(backend: str) -> list[tuple[str, str, str, str]]:
    """Combinations such that each length meets each place, hidden and heads in turns."""
    made = []
    for i, place in enumerate(PLACES):
        for j, lengths in enumerate(LENGTHS):
            if backend == "native" and "first" in PLACES[place]:
                continue
            made.append((lengths, HIDDEN[(i + j) % 4], place, list(HEADS)[(i + 2 * j) % 3]))
    return made


def _params(every: int) -> list[Any]:
    names = {"reference": (), "xla": (), "blockwise": (), "jax": (), "native": NATIVE.marks}
    made = []
    for name, marks in names.items():
        for i, cell in enumerate(cells(name)):
            slow = () if (i + len(name)) % every == 0 else (pytest.mark.slow,)
            made.append(pytest.param(name, *cell, marks=(*marks, *slow), id="-".join((name, *cell))))
    return made


@pytest.mark.parametrize(("backend", "lengths", "hidden", "place", "heads"), _params(9))
def test_a_backend_gives_what_float64_gives(backend: str, lengths: str, hidden: str, place: str, heads: str) -> None:
    mask = mask_of(LENGTHS[lengths], hidden, place)
    arrays = arrays_of(LENGTHS[lengths], HEADS[heads])
    truth = Truth(arrays, seen_of(LENGTHS[lengths], mask))
    truth.check(passes(backend, arrays, mask), f"{backend} {lengths} {hidden} {place}")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("lengths", ["few", pytest.param("many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_a_backend_gives_what_torch_gives(backend: str, lengths: str) -> None:
    import torch

    mask = mask_of(LENGTHS[lengths], "padding", "causal_by_row")
    arrays = arrays_of(LENGTHS[lengths])
    inputs = [torch.tensor(x).requires_grad_() for x in arrays[:3]]
    allowed = torch.tensor(seen_of(LENGTHS[lengths], mask))
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=allowed, enable_gqa=True)
    out.backward(torch.tensor(arrays[3]))
    wanted: list[Any] = [out.detach(), *(x.grad for x in inputs)]
    for one, other in zip(passes(backend, arrays, mask), wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("backend", "bits"),
    [("xla", "threefry"), ("blockwise", "hash"), pytest.param("native", "hash", marks=NATIVE.marks)],
)
@pytest.mark.parametrize("lengths", ["few", pytest.param("many", marks=pytest.mark.slow)])
def test_dropout_drops_the_same_in_every_backend(backend: str, bits: Any, lengths: str) -> None:
    mask = mask_of(LENGTHS[lengths], "both", "causal")
    arrays = arrays_of(LENGTHS[lengths])
    found, wanted = (passes(name, arrays, mask, 0.3, dropout_bits=bits) for name in (backend, "reference"))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
    without = passes("reference", arrays, mask)
    assert np.abs(np.asarray(without[0]) - np.asarray(wanted[0])).max() > 0.1


def test_a_part_of_the_queries_gets_the_rows_of_all() -> None:
    q, k, v, _ = arrays_of(LENGTHS["same"])
    mask = MaskSpec(causal=True, window=9)
    whole = attend(q, k, v, mask, Compute())
    part = attend(q[:, :, 21:30], k, v, MaskSpec(causal=True, window=9, first=21), Compute())
    np.testing.assert_allclose(part, whole[:, :, 21:30], atol=2e-6)


@pytest.mark.parametrize("backend", ["xla", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_bias_lies_between_queries_and_keys(backend: str) -> None:
    q, k, v, _ = arrays_of(LENGTHS["few"])
    bias = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 13, 61)), jnp.float32)
    mask = mask_of(LENGTHS["few"], "padding", "causal_by_row")

    def gradients(backend: str) -> Any:
        def total(q: Any, k: Any, bias: Any) -> Any:
            return (attend(q, k, v, mask, Compute(attention=backend), bias=bias) ** 2).sum()

        return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, bias)

    for one, other in zip(gradients(backend), gradients("reference"), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-4, rtol=2e-5)


@pytest.mark.parametrize("backend", ["blockwise", pytest.param("xla", marks=pytest.mark.slow)])
def test_the_same_on_many_devices(backend: str) -> None:
    mask, arrays = mask_of(LENGTHS["few"], "both", "causal_by_row"), arrays_of(LENGTHS["few"])
    alone = passes("reference", arrays, mask)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, fsdp=1, context=1), jax.devices()[:4])):
        for one, other in zip(passes(backend, arrays, mask), alone, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


WANTS: dict[str, dict[str, Any]] = {
    "needs as many keys as queries": {"key_length": 256},
    "knows one kind of segments, for queries and keys": {"segments": True, "key_segments": True},
    "needs the first query to stand at the first key": {"shifted": True, "causal": True},
}
TAKE_IT = ("blockwise", "xla", "jax", "reference")


@pytest.mark.parametrize("reason", WANTS)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_who_cannot_refuses_in_one_line(reason: str, platform: str) -> None:
    context = 1 if reason != "needs as many keys as queries" else 2
    operands = "float32" if platform == "cpu" else "bfloat16"
    plain: dict[str, Any] = {
        "platform": platform,
        "length": 128,
        "heads": 4,
        "key_heads": 4,
        "size": 64,
        "operands": operands,
    }
    for split in (1, context):
        square, asked = Request(**plain, context=split), Request(**plain, context=split, **WANTS[reason])
        for backend in BACKENDS:
            if backend.refuses(square) is None and backend.name not in TAKE_IT:
                takes = backend.name == "native" and "first query" not in reason
                assert backend.refuses(asked) == (None if takes else reason), backend.name
            elif backend.name in TAKE_IT and split == 1:
                assert backend.refuses(asked) is None
    assert choose(Request(**plain, **WANTS[reason])).backend.name in (*TAKE_IT, "native")
    assert set(TAKE_IT) < set(NAMES)


def test_what_is_asked_for_and_cannot_be_is_an_error() -> None:
    q, k, v, _ = arrays_of(LENGTHS["few"])
    with pytest.raises(UserError, match=r"native (needs the first query|is not|runs|needs a)"):
        attend(q, k, v, MaskSpec(causal=True, first=4), Compute(attention="native"))
    for mask, message in (
        (MaskSpec(jnp.ones((2, 13), bool)), r"mask: padding \(2, 13\): must be \(2, 61\)"),
        (MaskSpec(segments=jnp.ones((2, 13), jnp.int32)), "say nothing of 61 keys: give key_segments too"),
        (MaskSpec(key_segments=jnp.ones((2, 61), jnp.int32)), "key_segments without segments"),
        (MaskSpec(first=jnp.zeros(3, jnp.int32)), r"first \(3,\): must be an int, \[\] or \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, mask, Compute())
