"""TPU kernels: values and gradients in Pallas' interpret mode, and compiled ahead of time for real chips (slow)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxft.attention import MaskSpec, attend, tokens_last
from jaxft.attention.fused import tpu
from jaxft.layers import Compute
from jaxft.models.families import bert, llama
from jaxft.models.initial import init_params

from .cases import DIRECTIONS, HIDDEN, Case, both_passes

KERNELS = ("fused", "splash", "flash")
TOLERANCE = {"float32": 3e-5, "bfloat16": 4e-2}
FEW = [
    Case("bidirectional", "padding", "mha", 64, 100, "float32"),
    Case("causal", "segments", "gqa", 64, 128, "float32"),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """pltpu's own mode cannot take kernels under vmap, as splash is used; flash has no other one."""
    monkeypatch.setattr(tpu, "_INTERPRET", True)


def assert_follows(case: Case, backend: str) -> None:
    wanted = both_passes(case, "reference")
    with pltpu.force_tpu_interpret_mode() if backend == "flash" else contextlib.nullcontext():
        found = both_passes(case, backend, platform="tpu")
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE[case.operands], err_msg=name)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_kernel_follows_the_reference(case: Case, backend: str) -> None:
    assert_follows(case, backend)


@pytest.mark.parametrize(
    ("direction", "hidden", "heads"), [("causal_window", "padding", "gqa"), ("bidirectional", "segments", "mha")]
)
def test_dropout_inside_the_kernel_is_that_of_the_reference(direction: str, hidden: str, heads: str) -> None:
    case = Case(direction, hidden, heads, 64, 200, "float32")
    results = [
        both_passes(case, name, platform="tpu", rate=0.3, key=jax.random.key(5), bits="hash")
        for name in ("reference", "fused")
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_soft_cap_and_scale_inside_the_kernel() -> None:
    case = Case("causal", "segments", "mqa", 32, 256, "float32")
    results = [both_passes(case, name, platform="tpu", soft_cap=2.0, scale=0.3) for name in ("reference", "fused")]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


MODELS = {
    "bert": bert.Model(bert.Config(96, 32, 2, 2, 64, max_position_embeddings=128)),
    "llama": llama.Model(
        llama.Config(96, 32, 64, 2, 4, 2, head_dim=16, max_position_embeddings=128, attention_bias=True)
    ),
}


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bert")])
def test_heads_that_are_made_with_tokens_last_change_nothing(family: str) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 96, (3, 128)), jnp.int32)
    mask = (jnp.arange(128) < jnp.asarray([[128], [77], [5]])).astype(jnp.int32)
    model = MODELS[family]
    assert tokens_last((3, 4, 128, 16), 2, MaskSpec(), Compute(attention="fused", platform="tpu"))
    assert not tokens_last((3, 4, 100, 16), 2, MaskSpec(), Compute(attention="fused", platform="tpu"))
    params = init_params(model, 1)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params)  # biases too

    def gradients(backend: str) -> tuple[Any, Any]:
        as_asked = model.clone(compute=Compute(attention=backend, platform="tpu"))

        def loss(params: Any) -> jax.Array:
            out: Any = as_asked.apply({"params": params}, tokens, mask)
            return (jnp.sin(out.hidden) * mask[..., None]).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    (one, gradient), (other, wanted) = gradients("fused"), gradients("xla")
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        found = functools.reduce(lambda tree, key: tree[key.key], path, wanted)
        np.testing.assert_allclose(leaf, found, rtol=1e-4, atol=2e-5 * np.abs(found).max() + 1e-5, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("heads", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_kernel_follows_the_reference_everywhere(direction: str, hidden: str, heads: str, backend: str) -> None:
    if backend == "flash" and "window" in DIRECTIONS[direction]:
        pytest.skip("flash refuses windows")
    size = {"mha": 64, "gqa": 128, "mqa": 80}[heads]
    case = Case(direction, hidden, heads, size, 130, "float32")
    assert_follows(case, backend)
    assert_follows(dataclasses.replace(case, length=128, operands="bfloat16"), backend)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("backend", "length", "dropout", "most_mib"),
    [
        ("fused", 128, 0.1, 1),
        ("fused", 512, 0.1, 1),
        ("fused", 1024, 0.0, 1),
        ("splash", 512, 0.0, 400),
        ("flash", 512, 0.0, 900),
    ],
)
def test_kernels_compile_for_real_chips(
    backend: str, length: int, dropout: float, most_mib: int, topology: str
) -> None:
    """BERT's shapes, 16384 tokens, both passes, ahead of time. One array of q's size is 24 MiB, all logits at 512 are 192 MiB."""
    case = {
        "backend": backend, "length": length, "dropout": dropout, "topology": topology,
        "bits": "hash", "heads": "12", "causal": False,
    }  # fmt: skip
    script = Path(__file__).parents[2] / "benchmarks/attention_tpu.py"
    answer = subprocess.run([sys.executable, script, "--one", json.dumps(case)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    print(case, found)
    assert found["temp_mib"] < most_mib
    assert found["llo_ms"] > 0


@pytest.mark.parametrize("hidden", ["padding", "segments"])
def test_rows_that_see_nothing_give_zeros_inside_the_kernel(hidden: str) -> None:
    q, k, v, g = Case("bidirectional", "none", "gqa", 32, 128, "float32").arrays
    nothing = jnp.asarray([[1] * 128, [0] * 128], bool if hidden == "padding" else jnp.int32)
    mask = MaskSpec(padding=nothing) if hidden == "padding" else MaskSpec(segments=nothing)
    compute = Compute(attention="fused", platform="tpu")
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, compute), q, k, v)
    for x in (out, *vjp(g)):
        np.testing.assert_array_equal(x[1], np.zeros_like(x[1]))
        assert np.isfinite(x).all()
        assert np.abs(x[0]).max() > 0
