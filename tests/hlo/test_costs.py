"""What is counted in programs compiled for eight CPU devices, against closed forms."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.planning.hlo.costs import Collective, Costs, costs_of

L, B, D, F = 5, 16, 64, 256


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "x"), axis_types=(AxisType.Auto, AxisType.Auto))


def array(shape: tuple[int, ...], *spec: Any, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh(), P(*spec)))


def compiled(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Costs:
    text = jax.jit(f, **kwargs).lower(*args).compile().as_text()
    assert text is not None
    return costs_of(text)


def mapped(f: Callable[..., Any], shape: tuple[int, ...], in_spec: P, out_spec: P) -> tuple[Collective, ...]:
    whole = jax.shard_map(f, mesh=mesh(), in_specs=in_spec, out_specs=out_spec, check_vma=False)
    return compiled(whole, array(shape, *in_spec)).collectives


def test_fsdp_step_under_scan() -> None:
    w = {"a": array((L, D, F), None, "x"), "b": array((L, F, D), None, None, "x")}

    def step(w: Any, x: jax.Array) -> Any:
        def layer(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(h @ w["a"]) @ w["b"], None

        gradient = jax.grad(lambda w: jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2))(w)
        return jax.tree.map(lambda w, g: w - g, w, gradient)

    costs = compiled(step, w, array((B, D), ("data", "x")), out_shardings=jax.tree.map(lambda w: w.sharding, w))
    # Each device has B / 8 rows; two products per layer, each once forwards and twice backwards.
    assert costs.matmul_flops == 6 * L * 2 * (B // 8) * D * F
    assert costs.unknown_trips == ()
    assert costs.estimated_cycles == 0
    kinds = Counter((c.kind, c.count, c.group, c.bytes) for c in costs.collectives)
    # Both weights, forwards and backwards.
    assert kinds["all-gather", L, 4, D * F * 4] == 4
    # CPU has no reduce-scatter: it sums gradients over `x` whole, both in one, and the slices it keeps over `data`.
    summed = sum(c.count * c.wire_bytes for c in costs.collectives if c.kind == "all-reduce")
    assert summed == L * 2 * (2 * 3 / 4 * D * F * 4 + 2 * 1 / 2 * D * F)


def test_psum() -> None:
    (one,) = mapped(lambda x: jax.lax.psum(x, "x"), (8, 64), P("data", "x"), P("data"))
    assert (one.kind, one.count, one.group, one.bytes, one.wire_bytes) == (
        "all-reduce",
        1,
        4,
        4 * 16 * 4,
        2 * 3 / 4 * 256,
    )
    assert (one.dtype, one.shape, one.asynchronous) == ("f32", (4, 16), False)
    assert "psum" in one.where


def test_all_to_all() -> None:
    found = mapped(lambda x: jax.lax.all_to_all(x, "x", 1, 0, tiled=True), (16, 8), P("x"), P(None, "x"))
    assert [(c.kind, c.group, c.bytes, c.wire_bytes) for c in found] == [("all-to-all", 4, 4 * 8 * 4, 3 / 4 * 128)]


def test_ppermute_in_a_loop() -> None:
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def f(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.ppermute(x, "x", ring) + 1, x)

    found = mapped(f, (16, 8), P("x"), P("x"))
    assert [(c.kind, c.count, c.group, c.bytes, c.wire_bytes) for c in found] == [
        ("collective-permute", 3, 4, 128, 128)
    ]


def test_scatter_and_gather() -> None:
    def f(x: jax.Array) -> jax.Array:
        part = jax.lax.psum_scatter(x, "x", scatter_dimension=0, tiled=True)
        return jax.lax.all_gather(jnp.sin(part), "data", axis=1, tiled=True)

    found = {c.kind: c for c in mapped(f, (32, 16), P(None, "data"), P("x"))}
    assert set(found) == {"reduce-scatter", "all-gather"}
    assert (found["reduce-scatter"].bytes, found["reduce-scatter"].wire_bytes) == (32 * 8 * 4, 3 / 4 * 1024)
    gathered = found["all-gather"]
    assert (gathered.shape, gathered.bytes, gathered.wire_bytes, gathered.group) == ((8, 16), 512, 256, 2)


@pytest.mark.parametrize("dearer_first", [True, False])
def test_conditional_counts_its_dearer_branch(dearer_first: bool) -> None:
    def dear(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 4, lambda _, x: x @ x, x)

    def cheap(x: jax.Array) -> jax.Array:
        return x @ x

    branches = (dear, cheap) if dearer_first else (cheap, dear)
    x, on = jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)
    assert compiled(lambda on, x: jax.lax.cond(on, *branches, x), on, x).matmul_flops == 4 * 2 * 32**3
    which = jax.ShapeDtypeStruct((), jnp.int32)
    costs = compiled(lambda i, x: jax.lax.switch(i, (jnp.sin, *branches), x), which, x)
    assert costs.matmul_flops == 4 * 2 * 32**3


def test_loop_until_the_data_says_so() -> None:
    def f(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    costs = compiled(f, jax.ShapeDtypeStruct((32, 32), jnp.float32))
    assert costs.matmul_flops == 2 * 32**3
    assert len(costs.unknown_trips) == 1


def test_batched_products() -> None:
    q = jax.ShapeDtypeStruct((2, 32, 4, 16), jnp.float32)
    costs = compiled(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), q, q)
    assert costs.matmul_flops == 2 * 2 * 4 * 32 * 32 * 16
