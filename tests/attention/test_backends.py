"""Every backend that runs here against `reference`, `reference` against torch; blocks, caps, bias, bits."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.attention import MaskSpec, attend
from jaxft.attention.backends import blockwise
from jaxft.config import MeshConfig
from jaxft.layers import Compute
from jaxft.parallel.sharding import make_mesh

from .cases import NATIVE, Case, all_cases, both_passes, few_cases

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
OURS = ("xla", "blockwise", NATIVE, "jax")

# Operands are exact in bfloat16; what is rounded are probabilities (relative 2**-9 each) and, in the backward pass, cotangents
# and the gradients of logits: errors of some 2**-9 of values and gradients, which reach 10.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at most 24 tokens and chunks of few heads, so that short rows have many of both."""
    monkeypatch.setattr(blockwise, "_BLOCK", 24)
    monkeypatch.setattr(blockwise, "_LOGITS", {"cpu": 3000})


def assert_equal(case: Case, backend: str, **options: Any) -> None:
    wanted = both_passes(case, "reference", **options)
    found = both_passes(case, backend, **options)
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE[case.operands], err_msg=name)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("backend", ["blockwise", NATIVE])
@pytest.mark.parametrize("case", few_cases(), ids=str)
def test_a_backend_that_cuts_rows_and_heads_follows_the_reference(case: Case, backend: str) -> None:
    assert_equal(case, backend)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("backend", ["xla", "jax"])
@pytest.mark.parametrize("case", few_cases()[::3], ids=str)
def test_a_backend_of_the_same_few_lines_for_all_follows_the_reference(case: Case, backend: str) -> None:
    assert_equal(case, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_a_backend_follows_the_reference_everywhere(case: Case, backend: str) -> None:
    assert_equal(case, backend)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize("bits", ["threefry", "hash"])
@pytest.mark.parametrize("case", few_cases()[::5], ids=str)
def test_dropout_is_the_same_in_every_backend(case: Case, backend: str, bits: Any) -> None:
    case = dataclasses.replace(case, operands="float32")
    results = []
    for name in ("reference", backend):
        compute = Compute(attention=name, dropout_bits=bits)

        def run(q, k, v, g, compute=compute):
            out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, case.mask, compute, 0.3, jax.random.key(3)), q, k, v)
            return out, *vjp(g)

        results.append(jax.jit(run)(*case.arrays))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize("case", few_cases()[::7], ids=str)
def test_soft_cap_and_scale(case: Case, backend: str) -> None:
    assert_equal(case, backend, soft_cap=1.5, scale=0.4)


@pytest.mark.parametrize("backend", ["xla", "jax"])
@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (1, 1), (2, 4)])
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_a_bias_and_its_gradient(backend: str, shape: tuple[int, int], heads: str) -> None:
    case = Case("causal", "padding", heads, 32, 48, "float32")
    bias = jnp.asarray(np.random.default_rng(0).standard_normal((*shape, 48, 48)), jnp.float32)

    def run(backend: str):
        compute = Compute(attention=backend)

        def one(q, k, v, bias, g):
            out, vjp = jax.vjp(lambda q, k, v, b: attend(q, k, v, case.mask, compute, bias=b), q, k, v, bias)
            return out, *vjp(g)

        q, k, v, g = case.arrays
        return jax.jit(one)(q, k, v, bias, g)

    for one, other in zip(run(backend), run("reference"), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.sampled(3)
@needs_torch
@pytest.mark.parametrize("case", [c for c in few_cases() if c.hidden != "none" or c.heads == "gqa"], ids=str)
def test_the_reference_is_torch(case: Case) -> None:
    import torch

    case = dataclasses.replace(case, operands="float32")
    q, k, v, g = (torch.tensor(np.asarray(x)) for x in case.arrays)
    allowed = case.mask.allowed(case.length)
    allowed = np.ones((1, 1, case.length, case.length), bool) if allowed is None else np.asarray(allowed)
    sees = np.broadcast_to(allowed.any(-1, keepdims=True), (2, 1, case.length, 1))
    # torch gives nan for rows that may see nothing: there they see all and get no cotangent.
    allowed = torch.tensor(np.broadcast_to(allowed | ~allowed.any(-1, keepdims=True), (2, 1, case.length, case.length)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=allowed, enable_gqa=True)
    out.backward(g * torch.tensor(sees))
    grads: list[Any] = [x.grad for x in inputs]
    wanted = [out.detach().numpy() * sees, *(x.numpy() for x in grads)]
    for one, other in zip(both_passes(case, "reference"), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", *OURS])
@pytest.mark.parametrize("hidden", ["padding", "segments"])
def test_rows_that_see_nothing_give_zeros_and_zero_gradients(backend: str, hidden: str) -> None:
    case = Case("bidirectional", "none", "gqa", 32, 48, "float32")
    q, k, v, g = case.arrays
    nothing = jnp.asarray([[1] * 48, [0] * 48], bool if hidden == "padding" else jnp.int32)
    mask = MaskSpec(padding=nothing) if hidden == "padding" else MaskSpec(segments=nothing)

    @jax.jit
    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, Compute(attention=backend)), q, k, v)
        return out, *vjp(g)

    for x in run(q, k, v, g):
        np.testing.assert_array_equal(x[1], np.zeros_like(x[1]))
        assert np.isfinite(x).all()
        assert np.abs(x[0]).max() > 0


@pytest.mark.parametrize("backend", OURS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    case = Case("bidirectional", "padding", "mha", 32, 67, "float32")
    q, k, v, g = case.arrays

    @jax.jit
    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, case.mask, Compute(attention=backend)), q, k, v)
        return out, *vjp(g)

    assert all(np.isfinite(x).all() for x in run(1e4 * q, 1e4 * k, v, g))


@pytest.mark.parametrize("backend", OURS)
def test_what_is_in_one_document_never_moves_another(backend: str) -> None:
    case = Case("bidirectional", "segments", "gqa", 32, 67, "float32")
    q, k, v, _ = case.arrays
    run = jax.jit(lambda q, k, v: attend(q, k, v, case.mask, Compute(attention=backend)))
    first = (np.asarray(case.mask.segments) == 1)[:, None, :, None]
    before = run(q, k, v)
    after = run(*(jnp.where(first, 1e3 - 7 * x, x) for x in (q, k, v)))
    np.testing.assert_array_equal(np.where(first, 0, before), np.where(first, 0, after))


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_heads_and_rows_on_many_devices(backend: str, heads: str) -> None:
    case = Case("causal", "segments", heads, 32, 48, "float32")
    wanted = both_passes(case, backend)
    with jax.set_mesh(make_mesh(MeshConfig(2, tensor=2), jax.devices()[:4])):
        found = both_passes(case, backend)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("bits", ["threefry", "hash"])
def test_dropout_bits_do_not_depend_on_devices(bits: Any) -> None:
    case = Case("causal", "segments", "mha", 32, 48, "float32")
    compute = Compute(attention="blockwise", dropout_bits=bits)
    run = jax.jit(lambda q, k, v: attend(q, k, v, case.mask, compute, 0.3, jax.random.key(3)))
    wanted = run(*case.arrays[:3])
    with jax.set_mesh(make_mesh(MeshConfig(2, tensor=2), jax.devices()[:4])):
        found = jax.jit(lambda q, k, v: attend(q, k, v, case.mask, compute, 0.3, jax.random.key(3)))(*case.arrays[:3])
    np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_blockwise_keeps_and_makes_nothing_of_size_s_times_t() -> None:
    length = 480
    q, k, v, g = (jnp.ones((1, 2, length, 8)) for _ in range(4))

    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, MaskSpec(), Compute(attention="blockwise")), q, k, v)
        return out, *vjp(g)

    sizes = [
        var.aval.size
        for equation in _equations(jax.make_jaxpr(run)(q, k, v, g).jaxpr)
        for var in equation.outvars
        if hasattr(var.aval, "size")
    ]
    assert max(sizes) < length * length


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
