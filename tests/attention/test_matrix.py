"""What a call varies, crossed: lengths and blocks, windows, directions, what is hidden, heads, sizes of inputs, biases.

Each by itself was tested, and a window about as wide as a row of several blocks gave wrong gradients. Truth: numpy in float64.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxft.attention import MaskSpec, attend
from jaxft.attention.backends import blockwise
from jaxft.attention.fused import tpu
from jaxft.attention.native.compiled import unavailable
from jaxft.config import MeshConfig
from jaxft.layers import Compute
from jaxft.parallel.sharding import make_mesh

from .exact import LEAST, Truth, allowed, pairwise, whole_numbers

OURS = ("xla", "blockwise", "jax", "reference", *(("native",) if unavailable() is None else ()))
SIZES = (2.0**-10, 1.0, 2.0**5, 2.0**13, 2.0**50)
"""Of queries and keys: logits from 1e-5 to 1e31."""

LENGTHS = (1, 20, 72)  # one token; one block; three of blockwise's, two of the C++ kernels'
MORE_LENGTHS = (48, 67, 150)
WINDOWS = ("none", "itself", "narrow", "half", "whole", "wider")
HEADS = ((2, 2), (4, 2), (3, 1))
HIDDEN = ("none", "padding", "hole", "segments", "blind")
AXES = (LENGTHS, WINDOWS, (False, True), HIDDEN, HEADS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows have many blocks, and chunks of few heads."""
    monkeypatch.setattr(blockwise, "_BLOCK", 24)
    monkeypatch.setattr(blockwise, "_LOGITS", {"cpu": 3000})
    monkeypatch.setattr(tpu, "_INTERPRET", True)


def width(window: str, length: int) -> int | None:
    wide = {"none": None, "itself": 1, "narrow": 5, "half": length // 2 + 1, "whole": length, "wider": length + 9}
    return wide[window]


def hidden_of(kind: str, length: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Padding and segments of two rows."""
    place = np.arange(length)
    match kind:
        case "padding":  # at the end, and at the beginning: there, causal queries see nothing
            return np.stack([place < max(length - 7, 1), place >= length // 3]), None
        case "hole":  # wider than a narrow window
            return np.stack([(place < 3) | (place >= 15), place >= 0]), None
        case "segments":
            return None, np.stack([np.where(place < length - 4, 1 + place // 11, 0), 3 - place // 30]).astype(np.int32)
        case "blind":
            return np.stack([place < 0, place >= 0]), None
    return None, None


def check(backends: tuple[str, ...], case: tuple[Any, ...], platform: str = "cpu", sizes=SIZES, head: int = 16) -> None:
    """All sizes of inputs through one program for each backend."""
    length, window, causal, kind, heads = case
    padding, segments = hidden_of(kind, length)
    wide = width(window, length)
    mask = MaskSpec(*(None if x is None else jnp.asarray(x) for x in (padding, segments)), causal=causal, window=wide)
    q, k, v, g = whole_numbers(heads, length, head)
    seen = allowed(length, padding, segments, causal, wide)
    inputs = [(q * np.float32(size), k * np.float32(size), v, g) for size in sizes]
    truths = [Truth(arrays, seen) for arrays in inputs]
    for backend in backends:
        compute = Compute(attention=backend, platform=platform)

        @jax.jit
        def both(q, k, v, g, compute=compute):
            out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, compute), q, k, v)
            return out, *vjp(g)

        for size, arrays, truth in zip(sizes, inputs, truths, strict=True):
            truth.check(both(*arrays), f"{backend}, {case}, inputs of {size:.0e}")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("number", "case"), list(enumerate(pairwise(*AXES))), ids=str)
def test_all_that_a_call_varies_in_pairs(number: int, case: tuple[Any, ...]) -> None:
    # The last two are a few lines for all masks.
    check(tuple(name for name in OURS if number % 4 == 0 or name not in ("jax", "reference")), case)


@pytest.mark.parametrize("window", ["half", "whole"])
def test_a_ragged_last_block(window: str) -> None:
    check(("blockwise",), (67, window, False, "padding", (4, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("length", [*LENGTHS, *MORE_LENGTHS])
@pytest.mark.parametrize("window", WINDOWS)
def test_all_that_a_call_varies(window: str, length: int) -> None:
    for rest in itertools.product(*AXES[2:]):
        check(OURS, (length, window, *rest))


# Splash and flash keep log-sum-exp as one float32, which has no digits for a logarithm beside a large logit.
KERNELS = {"fused": SIZES, "splash": SIZES[:2], "flash": SIZES[:2]}
KERNEL_LENGTHS = (1, 128, 300)


def check_kernel(backend: str, case: tuple[Any, ...]) -> None:
    with pltpu.force_tpu_interpret_mode() if backend == "flash" else contextlib.nullcontext():
        check((backend,), case, "tpu", KERNELS[backend], 64)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        ("fused", (128, "whole", False, "padding", (4, 2))),
        ("fused", (300, "half", True, "blind", (2, 2))),
        ("splash", (128, "half", False, "hole", (2, 2))),
        ("flash", (1, "none", False, "none", (2, 2))),
    ],
    ids=str,
)
def test_kernels_in_some_pairs(backend: str, case: tuple[Any, ...]) -> None:
    check_kernel(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_in_all_pairs(backend: str) -> None:
    windows = ("none",) if backend == "flash" else WINDOWS
    for case in pairwise(KERNEL_LENGTHS, windows, (False, True), HIDDEN, HEADS):
        check_kernel(backend, case)


BIASES = ("finite", "-inf on keys", "-inf on rows", "least on keys", "least on rows", "both on rows")


def bias_of(kind: str, shape: tuple[int, int], length: int, size: float) -> np.ndarray:
    bias = np.random.default_rng(0).integers(-9, 10, (*shape, length, length)).astype(np.float32) * np.float32(size**2)
    value = -np.inf if kind.startswith("-inf") else LEAST
    if "keys" in kind:
        bias[..., length // 2 + 1 :] = value
    if "rows" in kind:
        bias[0, 0, : length // 2 + 1] = value
    if kind == "both on rows":
        bias[0, -1, :, : length // 2] = -np.inf
    return bias


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 4), (20, "none", False, "none", (4, 2))),
        ((1, 4), (20, "half", True, "padding", (4, 4))),
        ((2, 1), (20, "narrow", False, "hole", (3, 1))),
        ((1, 1), (20, "wider", True, "segments", (2, 2))),
        ((1, 1), (1, "none", False, "none", (4, 2))),
        ((2, 2), (20, "none", True, "blind", (2, 2))),
    ],
    ids=str,
)
def test_every_bias_that_people_pass(shape: tuple[int, int], case: tuple[Any, ...]) -> None:
    length, window, causal, kind, heads = case
    padding, segments = hidden_of(kind, length)
    wide = width(window, length)
    mask = MaskSpec(*(None if x is None else jnp.asarray(x) for x in (padding, segments)), causal=causal, window=wide)
    q, k, v, g = whole_numbers(heads, length)
    seen = allowed(length, padding, segments, causal, wide)
    for backend in ("xla", "jax", "reference"):
        compute = Compute(attention=backend)

        @jax.jit
        def both(q, k, v, bias, g, compute=compute):
            out, vjp = jax.vjp(lambda q, k, v, bias: attend(q, k, v, mask, compute, bias=bias), q, k, v, bias)
            return out, *vjp(g)

        for name, size in itertools.product(BIASES, SIZES[:4]):
            bias, arrays = bias_of(name, shape, length, size), (q * np.float32(size), k * np.float32(size), v, g)
            found = both(*arrays[:3], bias, g)
            Truth(arrays, seen, bias).check(found, f"{backend}, {case}, {name}, inputs of {size:.0e}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_is_not_rounded_to_the_operands_type(dtype: str) -> None:
    """bfloat16 has no number for the least float32: rounded, it would be -inf, and the row blind instead of uniform."""
    q, k, v, _ = whole_numbers((2, 2), 20)
    bias = np.full((1, 1, 20, 20), LEAST, np.float32)
    for backend in ("xla", "jax"):
        compute = Compute(attention=backend, matmul_dtype=dtype)
        out = jax.jit(lambda q, k, v, bias, c=compute: attend(q, k, v, MaskSpec(), c, bias=bias))(q, k, v, bias)
        np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), v.shape), atol=1e-2, err_msg=backend)


@pytest.mark.parametrize("window", [1, 3, 9, 16, 20])
@pytest.mark.parametrize("backend", ["ring", "all_to_all"])
def test_windows_over_rows_that_are_split(backend: str, window: int) -> None:
    mask, causal = MaskSpec(window=window, causal=window % 2 == 0), window % 2 == 0
    q, k, v, g = whole_numbers((4, 2), 16)
    compute = Compute(attention=backend)

    @jax.jit
    def both(q, k, v, g):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, compute), q, k, v)
        return out, *vjp(g)

    with jax.set_mesh(make_mesh(MeshConfig(2, context=2), jax.devices()[:4])):
        for size in SIZES:
            arrays = (q * np.float32(size), k * np.float32(size), v, g)
            Truth(arrays, allowed(16, None, None, causal, window)).check(both(*arrays), f"inputs of {size:.0e}")


def test_the_largest_logit_keeps_its_weight_when_it_is_computed_again() -> None:
    """Blocks of keys with all queries sum products in another order than blocks of queries with all keys."""
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((1, 1, 150, 64)).astype(np.float32) for _ in range(4))
    seen = allowed(150, None, None, False, 70)[:1]
    second, first = np.sort(np.where(seen, q @ k.swapaxes(2, 3), -np.inf))[..., -2:].transpose(3, 0, 1, 2)
    g = g * (first - second > 0.1)[..., None]  # where rounding decides which is the largest, there is no truth
    for backend in ("xla", "blockwise"):

        @jax.jit
        def values(q, k, v, g, backend=backend):
            mask, compute = MaskSpec(window=70), Compute(attention=backend)
            return jax.vjp(lambda v: attend(q, k, v, mask, compute), v)[1](g)[0]

        for size in (1e3, 1e4, 1e9):
            arrays = (q * np.float32(size), k * np.float32(size), v, g)
            np.testing.assert_allclose(values(*arrays), Truth(arrays, seen).wanted[3], atol=1e-4, err_msg=backend)
