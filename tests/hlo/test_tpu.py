"""Programs compiled for a v5e slice without a TPU: what is counted in them, and what they are priced at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxft.errors import UserError
from jaxft.machine.platform import COMPILE_ENV
from jaxft.planning.hlo.costs import Costs, costs_of
from jaxft.planning.hlo.llo import Bundles, ChipSpeed, LloPrice, bundles_in, llo_cycles, llo_flags

V5E = ChipSpeed(clock_hz=1.5e9, hbm_bytes_per_second=819e9, flops_per_second=197e12)

PREAMBLE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
mesh = Mesh(np.array(topology.devices).reshape(2, 4), ("data", "x"), axis_types=(AxisType.Auto,) * 2)
def array(shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
def write(f, *args, **kwargs):
    open(sys.argv[1], "w").write(jax.jit(f, **kwargs).lower(*args).compile().as_text())
"""

MATMUL = "write(lambda a, b: a @ b, array((8192, 8192)), array((8192, 8192)))"

# Two layers of an MLP, scanned forwards and backwards, and a step that a condition lets through.
STEP = """
L, B, D, F = 2, 8192, 1024, 4096
def loss(w, x):
    def layer(h, w):
        u = jax.nn.gelu(jnp.einsum("bd,df->bf", h, w["a"].astype(h.dtype), preferred_element_type=jnp.float32))
        v = jnp.einsum("bf,fd->bd", u.astype(h.dtype), w["b"].astype(h.dtype), preferred_element_type=jnp.float32)
        return (h + v).astype(h.dtype), None
    return jnp.mean(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)
def step(w, m, x):
    g = jax.tree.map(jax.lax.with_sharding_constraint, jax.grad(loss)(w, x), shardings)
    ok = jnp.isfinite(sum(jnp.sum(v * v) for v in jax.tree.leaves(g)))
    def update(w, m):
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
        return jax.tree.map(lambda w, m: w - 1e-3 * m, w, m), m
    return jax.lax.cond(ok, update, lambda w, m: (w, m), w, m)
w = {"a": array((L, D, F), None, "x", dtype=jnp.float32), "b": array((L, F, D), None, None, "x", dtype=jnp.float32)}
shardings = jax.tree.map(lambda w: w.sharding, w)
write(step, w, w, array((B, D), ("data", "x")), donate_argnums=(0, 1))
"""

EXCHANGES = """
def f(a, w):
    h = a @ jax.lax.all_gather(w, "x", axis=0, tiled=True)
    return (
        jax.lax.all_to_all(h.reshape(h.shape[0], 4, -1), "x", 1, 0, tiled=True),
        jax.lax.psum_scatter(h, "x", scatter_dimension=0, tiled=True),
        jax.lax.ppermute(h, "x", [(i, (i + 1) % 4) for i in range(4)]),
        jax.lax.psum(h, "data"),
    )
specs = (P("data"), P("data"), P("data"), P())
whole = jax.shard_map(f, mesh=mesh, in_specs=(P("data"), P("x")), out_specs=specs, check_vma=False)
write(whole, array((2048, 1024), "data"), array((1024, 2048), "x"))
"""

# exp of each block, twenty times over in a loop, as a Pallas kernel; beside it a batched product.
KERNEL = """
from jax.experimental import pallas as pl
def kernel(x, y):
    def body(_, carry):
        y[...] = jnp.exp(y[...])
        return carry
    y[...] = x[...]
    jax.lax.fori_loop(0, 20, body, 0)
def f(x, q):
    spec = pl.BlockSpec((256, 512), lambda i: (i, 0))
    y = pl.pallas_call(kernel, grid=(16,), in_specs=[spec], out_specs=spec, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
    return y, jnp.einsum("bqhd,bkhd->bhqk", q, q, preferred_element_type=jnp.float32)
one = jax.sharding.SingleDeviceSharding(topology.devices[0])
x = jax.ShapeDtypeStruct((4096, 512), jnp.float32, sharding=one)
write(f, x, jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16, sharding=one))
"""


def run(script: str, folder: Path, **env: str) -> str:
    """The text of the program that a script compiles, in a process of its own: libtpu reads its environment once."""
    out = folder / "program.txt"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREAMBLE + script, str(out)],
        # Of the suite's own flags, libtpu ends the process for those that it does not know.
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **COMPILE_ENV, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out.read_text()


def priced(script: str, folder: Path) -> tuple[Costs, LloPrice]:
    pytest.importorskip("libtpu")
    dump = folder / "llo"
    dump.mkdir()
    text = run(script, folder, LIBTPU_INIT_ARGS=llo_flags(dump))
    return costs_of(text), llo_cycles(dump, text, V5E)


@pytest.fixture(scope="module")
def matmul(tmp_path_factory: pytest.TempPathFactory) -> tuple[Costs, LloPrice]:
    return priced(MATMUL, tmp_path_factory.mktemp("matmul"))


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[Costs, LloPrice]:
    return priced(STEP, tmp_path_factory.mktemp("step"))


def test_large_matmul_by_both_prices(matmul: tuple[Costs, LloPrice]) -> None:
    costs, price = matmul
    assert costs.matmul_flops == 2 * 8192**3
    assert (costs.collectives, costs.unpriced, costs.unknown_trips) == ((), (), ())
    roofline = costs.matmul_flops / V5E.flops_per_second
    assert 1.03 < costs.estimated_cycles / V5E.clock_hz / roofline < 1.16
    assert price.seconds == pytest.approx(roofline / 0.93, rel=1e-3)
    assert list(price.by_kind) == ["matmul"]
    assert price.ops[0].bound == "matmul"


@pytest.mark.slow
def test_train_step_costs(step: tuple[Costs, LloPrice]) -> None:
    costs, price = step
    rows = 8192 // 8
    # Two products per layer, once forwards and twice backwards.
    assert costs.matmul_flops == 6 * 2 * 2 * rows * 1024 * 4096
    assert costs.unknown_trips == price.unknown_trips == ()
    assert {c.kind for c in costs.collectives} >= {"reduce-scatter", "all-reduce"}
    assert all(c.group in (2, 4, 8) for c in costs.collectives)
    # Whatever the compiler makes of them, each device gets the three other quarters of both weights, at least twice.
    moved = sum(c.count * c.wire_bytes for c in costs.collectives if c.kind in ("all-gather", "collective-permute"))
    assert moved >= 2 * 2 * 2 * (3 / 4) * 1024 * 4096 * 2


def test_train_step_price_lies_between_roofline_and_estimate(step: tuple[Costs, LloPrice]) -> None:
    costs, price = step
    roofline = costs.matmul_flops / V5E.flops_per_second
    assert roofline / 0.93 < price.seconds < costs.estimated_cycles / V5E.clock_hz
    assert sum(price.by_kind.values()) == price.cycles == pytest.approx(sum(op.total for op in price.ops))
    assert price.without_bundles == price.data_dependent == ()
    assert next(iter(price.by_kind)) == "matmul"
    # The update stands behind a condition: of its branches the one that does something.
    assert any("cond/branch" in op.where for op in price.ops)


def test_exchanges(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    costs = costs_of(run(EXCHANGES, tmp_path))
    whole = 1024 * 2048 * 2
    found = {c.kind: (c.bytes, c.wire_bytes, c.group, c.count) for c in costs.collectives}
    assert found == {
        "all-gather": (whole, 3 / 4 * whole, 4, 1),
        "all-to-all": (whole, 3 / 4 * whole, 4, 1),
        "reduce-scatter": (whole, 3 / 4 * whole, 4, 1),
        "collective-permute": (whole, whole, 4, 1),
        "all-reduce": (whole, whole, 2, 1),
    }
    assert [c.kind for c in costs.collectives if c.asynchronous] == ["collective-permute"]
    assert costs.matmul_flops == 2 * 1024 * 1024 * 2048


def test_pallas_kernels_are_priced(tmp_path: Path) -> None:
    costs, price = priced(KERNEL, tmp_path)
    assert costs.matmul_flops == 2 * 2 * 4 * 256 * 256 * 64
    assert [name.partition(" ")[2] for name in costs.unpriced] == ["(tpu_custom_call)"]
    (kernel,) = [op for op in price.ops if op.kind == "custom call"]
    # Both loops count: sixteen blocks of 128 registers, twenty times over, of which each takes one bundle or a little more.
    assert 1 < kernel.cycles / (16 * 20 * 128) < 1.3
    assert price.data_dependent == ()
    assert kernel.bound == "bundles"


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LIBTPU_INIT_ARGS"):
        llo_cycles(tmp_path, "", V5E)


def bundles(*rows: str) -> str:
    return "= control target key start\n= control target key end\n\n" + "\n".join(rows)


PIPELINE: tuple[Any, ...] = (
    "     0   :  { %s0 = smov.u32 0 }",
    "   0x1 LB: > { %s1 = sadd.s32 4294967294, %s2 /* iteration index, stage = 2 */ } /* Start region 7 :: Start region 8 */",
    "   0x2   : > { %9 = sbr.rel (%p1) target = $region20 }",
    "   0x3   : > { %10 = dma.general /* window_bounds: (1, 1)",
    "strides: (1, 1) */ }",
    "   0x4 PF: > { %p2 = scmp.ge.s32.totalorder %s3, 12 /* loop exit test */ } /* Start/End empty region 20 */",
    "   0x5   :  { %16 = sbr.rel (!%p2) target = $region8 }",
    *(f"   0x{i}   :  {{}}" for i in range(6, 10)),
    "   0xa   :  { %17 = vsyncpa [#allocation4], 1 }",
)


@pytest.mark.parametrize(("steps", "trips"), [(None, 10), (10, 10), (8, 8), (40, 10)])
def test_bundles_of_a_loop_over_windows(steps: int | None, trips: int) -> None:
    assert bundles_in(bundles(*PIPELINE), steps) == Bundles(2 + 9 * trips, 0)


def test_bundles_of_a_loop_of_unknown_length() -> None:
    rows = [row.replace("/* loop exit test */", "").replace("stage = 2", "") for row in PIPELINE]
    assert bundles_in(bundles(*rows)) == Bundles(11, 1)
