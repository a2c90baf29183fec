"""The C++ kernels: many blocks in both directions, any mask, dropout, devices; and what is said where there is no compiler."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.attention import MaskSpec, attend, choose
from jaxft.attention.native.compiled import multiplies_bfloat16, unavailable
from jaxft.config import MeshConfig
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.parallel.sharding import make_mesh

from .cases import DIRECTIONS
from .test_choice import CPU

needs_compiler = pytest.mark.skipif(unavailable() is not None, reason=f"native {unavailable()}")


def passes(backend: str, arrays: list[jax.Array], mask: MaskSpec, **options: Any) -> list[np.ndarray]:
    """Output and gradients, with hash dropout at 0.3 if there is a ``key``."""
    compute = Compute(attention=backend, dropout_bits="hash", **options.pop("compute", {}))

    def run(q, k, v, g):
        rate = 0.3 if "key" in options else 0.0
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, compute, rate, **options), q, k, v)
        return out, *vjp(g.astype(out.dtype))

    return [np.asarray(x, np.float32) for x in jax.jit(run)(*arrays)]


def arrays_of(rows: int, heads: int, key_heads: int, length: int, size: int) -> list[jax.Array]:
    rng = np.random.default_rng(length)
    return [
        jnp.asarray(rng.standard_normal((rows, n, length, size)), jnp.float32)
        for n in (heads, key_heads, key_heads, heads)
    ]


def assert_same(arrays: list[jax.Array], mask: MaskSpec, tolerance: float = 2e-5, **options: Any) -> None:
    found, wanted = (passes(name, arrays, mask, **options) for name in ("native", "reference"))
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance, err_msg=name)


@pytest.mark.sampled(3)
@needs_compiler
@pytest.mark.parametrize("hidden", ["none", "padding", "documents", "shuffled"])
@pytest.mark.parametrize("direction", [*DIRECTIONS, "far_window"])
def test_many_blocks_of_queries_and_keys(direction: str, hidden: str) -> None:
    length = 333
    place = np.arange(length)
    rng = np.random.default_rng(0)
    padding = segments = None
    if hidden == "padding":  # the first row ends early, the second one begins late
        padding = jnp.asarray(np.stack([place < 130, place >= 140]))
    if hidden == "documents":
        segments = jnp.asarray(np.stack([1 + place // 64, np.where(place < 300, 1 + place // 150, 0)]), jnp.int32)
    if hidden == "shuffled":
        segments = jnp.asarray(rng.integers(0, 3, (2, length)), jnp.int32)
    mask = MaskSpec(padding, segments, **(DIRECTIONS | {"far_window": {"window": 140}})[direction])
    assert_same(arrays_of(2, 4, 2, length, 32), mask)


@needs_compiler
@given(
    length=st.integers(1, 200),
    heads=st.sampled_from([(1, 1), (6, 2), (3, 3)]),
    size=st.sampled_from([16, 48, 96]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 200),
    dropout=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    draw=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_any_shape_and_mask(
    length: int,
    heads: tuple[int, int],
    size: int,
    causal: bool,
    window: int | None,
    dropout: bool,
    scale: float | None,
    draw: int,
) -> None:
    rng = np.random.default_rng(draw)
    kind = draw % 3
    padding = jnp.asarray(rng.random((2, length)) < 0.7) if kind == 1 else None
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (2, length))), jnp.int32) if kind == 2 else None
    options: dict[str, Any] = {"scale": scale}
    if dropout:
        options["key"] = jax.random.key(draw)
    assert_same(arrays_of(2, *heads, length, size), MaskSpec(padding, segments, causal, window), 5e-5, **options)


NARROW = {"matmul_dtype": "bfloat16", "activation_dtype": "bfloat16"}


@needs_compiler
@pytest.mark.parametrize("length", [63, 333])
@pytest.mark.parametrize("dropout", [False, True])
def test_bfloat16_operands_of_float32_activations(length: int, dropout: bool) -> None:
    arrays, mask = arrays_of(1, 4, 2, length, 64), MaskSpec(causal=True)
    options = {"key": jax.random.key(3)} if dropout else {}
    found = passes("native", arrays, mask, compute={"matmul_dtype": "bfloat16"}, **options)
    wanted = passes("reference", arrays, mask, **options)
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert 0 < np.abs(one - other).max() <= 2**-6 * max(1.0, np.abs(other).max()), name
        if multiplies_bfloat16():  # results are no bfloat16 numbers
            assert (one != np.asarray(jnp.asarray(one).astype(jnp.bfloat16), np.float32)).mean() > 0.9


@pytest.mark.sampled(7)
@needs_compiler
@pytest.mark.parametrize("size", [32, 48, 64])  # 48 no vector of pairs divides: float32 products of rounded numbers
@pytest.mark.parametrize("length", [1, 63, 333])
@pytest.mark.parametrize("hidden", ["none", "padding", "documents"])
@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_bfloat16_operands_and_activations(direction: str, hidden: str, length: int, size: int) -> None:
    arrays = [x.astype(jnp.bfloat16) for x in arrays_of(2, 4, 2, length, size)]
    place = np.arange(length)
    padding = jnp.asarray(np.stack([place < 50, place >= 20])) if hidden == "padding" else None
    segments = jnp.asarray(np.stack([1 + place // 7, 1 + place // 150]), jnp.int32) if hidden == "documents" else None
    mask = MaskSpec(padding, segments, **DIRECTIONS[direction])
    out = jax.eval_shape(lambda q, k, v: attend(q, k, v, mask, Compute(attention="native", **NARROW)), *arrays[:3])
    assert out.dtype == jnp.bfloat16
    found, wanted = (
        passes(name, arrays, mask, compute=compute, key=jax.random.key(3))
        for name, compute in (("native", NARROW), ("reference", {}))
    )
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        # Every factor has 8 bits, and so has the output that the backward pass begins with.
        assert np.abs(one - other).max() <= 2**-6 * max(1.0, np.abs(other).max()), name


@needs_compiler
@pytest.mark.skipif(unavailable() is not None or not multiplies_bfloat16(), reason="the processor does not")
@pytest.mark.parametrize(("activations", "ending"), [("bfloat16", "_bfloat16"), ("float32", "_bfloat16_float32")])
def test_bfloat16_is_multiplied_as_such_and_nothing_is_widened(activations: str, ending: str) -> None:
    arrays = [x.astype(activations) for x in arrays_of(1, 2, 2, 150, 64)]
    compute = Compute(attention="native", matmul_dtype="bfloat16", activation_dtype=activations)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        return jax.vjp(lambda q, k, v: attend(q, k, v, MaskSpec(), compute), q, k, v)[1](g)

    text = str(jax.make_jaxpr(both)(*arrays))
    assert f"target_name=jaxft_attention_forward{ending}\n" in text
    assert f"target_name=jaxft_attention_backward{ending}\n" in text
    assert ("bf16" if activations == "float32" else "f32") + "[1,2,150,64]" not in text


@needs_compiler
def test_rows_heads_and_dropout_on_many_devices() -> None:
    arrays, mask, key = arrays_of(2, 4, 2, 70, 16), MaskSpec(causal=True), jax.random.key(1)
    wanted = passes("native", arrays, mask, key=key)
    with jax.set_mesh(make_mesh(MeshConfig(2, tensor=2), jax.devices()[:4])):
        found = passes("native", arrays, mask, key=key)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@needs_compiler
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("hidden", ["none", "padding"])
@pytest.mark.parametrize("compute", [{}, NARROW], ids=["float32", "bfloat16"])
def test_a_nan_is_not_hidden(which: int, hidden: str, compute: dict[str, str]) -> None:
    arrays = arrays_of(1, 1, 1, 70, 32)
    arrays[which] = arrays[which].at[0, 0, 3, 5].set(jnp.nan)
    mask = MaskSpec(padding=jnp.arange(70)[None] < 60 if hidden == "padding" else None)
    out = passes("native", arrays, mask, compute=compute)[0]
    assert np.isnan(out[0, 0, 3]).any()


@needs_compiler
@pytest.mark.parametrize("compute", [{}, NARROW], ids=["float32", "bfloat16"])
def test_the_same_call_gives_the_same_bits(compute: dict[str, str]) -> None:
    arrays = arrays_of(3, 5, 5, 200, 32)
    first, *others = (passes("native", arrays, MaskSpec(), compute=compute) for _ in range(4))
    for other in others:
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "tpu"}, "native runs on CPUs only"),
        ({"size": 40}, "native takes head sizes that are multiples of 16"),
        ({"dropout": "threefry"}, r"native draws no threefry bits \(model.dropout_bits=hash\)"),
        ({"soft_cap": True}, "native has no soft cap"),
        ({"bias": True}, "native adds no bias; use xla or jax or reference"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"model.attention=native: {reason}"):
        choose(dataclasses.replace(CPU, **change), "native")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"JAXFT_NATIVE": "0"}, "is switched off (JAXFT_NATIVE=0)"),
        (
            {"PATH": "", "CXX": ""},
            "needs a C++ compiler, and there is no c++, g++ or clang++ (install one, or set CXX)",
        ),
        ({"CXX": "no-such-compiler -v"}, "could not be compiled by no-such-compiler -v: [Errno 2]"),
        ({"CXX": "'g++"}, "cannot read CXX='g++: No closing quotation"),
        ({"CXX": "false"}, "could not be compiled by false: exit code 1"),
    ],
)
def test_without_a_compiler_auto_goes_on_and_says_why(variables: dict[str, str], reason: str, tmp_path: Path) -> None:
    program = (
        "from jaxft.attention import Request, choose\n"
        "from jaxft.attention.native.compiled import unavailable\n"
        "print(unavailable())\n"
        "print(choose(Request('cpu', 128, 4, 4, 64, 'float32')).backend.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAXFT_NATIVE": ""} | variables,
        capture_output=True,
        text=True,
    )
    why, name = done.stdout.splitlines()
    assert why.startswith(reason)
    assert name in ("blockwise", "xla")


@needs_compiler
def test_a_library_is_compiled_once(tmp_path: Path) -> None:
    program = "from jaxft.attention.native.compiled import unavailable; print(unavailable())"
    # That the library is found again is seen without optimising it, which takes most of the time.
    compiler = tmp_path / "quick"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "c++"} "$@" -O0\n')
    compiler.chmod(0o700)
    times = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)},
            capture_output=True,
            text=True,
        )
        assert done.stdout == "None\n", done.stderr
        (library,) = tmp_path.glob("jaxft/*")
        times.append(library.stat().st_mtime_ns)
    assert times[0] == times[1]
