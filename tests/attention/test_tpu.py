"""TPU kernels: values and gradients in Pallas' interpret mode, and compiled ahead of time for real chips (slow)."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxft.attention import tpu

from .cases import DIRECTIONS, HIDDEN, Case, both_passes

KERNELS = ("splash", "flash")
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


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_kernel_follows_the_reference(case: Case, backend: str) -> None:
    assert_follows(case, backend)


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
