"""Look-ups against plain indexing, on one device and on meshes that split tokens, widths or both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import MeshConfig
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.layers.embedding import look_up
from jaxft.parallel.sharding import make_mesh, no_mesh

NAMES = ("vocab", "embed")
MESHES: dict[str, dict[str, Any]] = {
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "data2_fsdp4": {"data": 2, "fsdp": 4},
    "fsdp2_context2_tensor2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    "data2_fsdp2_context2": {"data": 2, "fsdp": 2, "context": 2},
    "explicit": {"data": 2, "fsdp": 4, "axes": "explicit"},
}


@contextmanager
def on(name: str | None) -> Iterator[None]:
    if name is None:
        with no_mesh():
            yield
    else:
        with jax.set_mesh(make_mesh(MeshConfig(**MESHES[name]), jax.devices()[:8])):
            yield


def gradient(table: jax.Array, ids: jax.Array, g: jax.Array, compute: Compute) -> tuple[jax.Array, jax.Array]:
    out, vjp = jax.vjp(lambda table: look_up(table, ids, NAMES, compute), table)
    return out, vjp(g.astype(out.dtype))[0]


@pytest.mark.parametrize("rows", [4, 300])  # fewer and more than tokens
@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_rows_and_the_gradient_of_the_table(mesh: str | None, rows: int) -> None:
    rng = np.random.default_rng(rows)
    table, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((rows, 32), (8, 6, 32)))
    ids = jnp.asarray(rng.integers(0, rows + 2, (8, 6)), jnp.int32)  # two of them beyond the table
    clipped = np.minimum(ids, rows - 1)
    wanted = np.zeros((rows, 32))
    np.add.at(wanted, clipped, np.asarray(g))
    with on(mesh):
        run = partial(gradient, compute=Compute())
        if mesh == "explicit":
            run = jax.sharding.auto_axes(run, out_sharding=jax.P())
        out, found = jax.jit(run)(table, ids, g)
    there = np.asarray(ids)[..., None] < rows
    np.testing.assert_array_equal(out, np.where(there, np.asarray(table)[clipped], np.nan))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, "data2_fsdp4"])
def test_gradients_of_bfloat16_vectors_are_added_up_in_float32(mesh: str | None) -> None:
    # 256 + 1 is 256 in bfloat16: 64 times 1 would be lost beside one 256.
    ids, g = jnp.zeros((8, 9), jnp.int32), jnp.ones((8, 9, 32)).at[:, 0].set(256.0)
    compute = Compute(activation_dtype="bfloat16")
    with on(mesh):
        out, found = jax.jit(gradient, static_argnums=3)(jnp.zeros((300, 32)), ids, g, compute)
    assert out.dtype == jnp.bfloat16
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0], 8 * (256 + 8))


def test_places_are_looked_up_by_a_vector_of_ids() -> None:
    table = jnp.arange(12.0).reshape(6, 2)
    with on("fsdp8"):
        np.testing.assert_array_equal(look_up(table, jnp.asarray([1, 5]), NAMES, Compute()), [[2.0, 3.0], [10.0, 11.0]])


@pytest.mark.parametrize(("axis", "kind"), [("vocab", "token"), ("types", "token type"), ("positions", "position")])
@pytest.mark.parametrize("value", [-1, 6, 1000])
def test_known_ids_beyond_the_table_are_refused(axis: str, kind: str, value: int) -> None:
    table, ids = jnp.ones((6, 2)), jnp.asarray([[0, 5], [value, 1]])
    message = rf"^{kind} {value} is not in the table of 6 rows: values run from 0 to 5$"
    with no_mesh(), pytest.raises(UserError, match=message):
        look_up(table, ids, (axis, "embed"), Compute())


def test_traced_ids_beyond_the_table_give_nan() -> None:
    with no_mesh():
        out = jax.jit(lambda table, ids: look_up(table, ids, NAMES, Compute()))(
            jnp.ones((6, 2)), jnp.asarray([0, 6, -1])
        )
    np.testing.assert_array_equal(np.isnan(out), [[False] * 2, [True] * 2, [True] * 2])


def test_look_ups_of_checked_ids_cost_no_select() -> None:
    shapes = jax.ShapeDtypeStruct((6, 2), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)

    def operations(known: bool) -> str:
        compute = Compute(known_ids=known)
        return str(jax.make_jaxpr(lambda table, ids: look_up(table, ids, NAMES, compute))(*shapes))

    with no_mesh():
        assert "nan" in operations(False)
        assert "nan" not in operations(True)
