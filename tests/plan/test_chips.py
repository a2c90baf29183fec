"""Names of slices, and what links between their chips can carry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.machine.chips import CHIPS, parse_topology


@pytest.mark.parametrize(
    ("text", "chips", "libtpu"),
    [
        ("v5e-16", 16, "v5e:4x4"),
        ("v5e-8", 8, "v5e:2x4"),
        ("v5e-1", 1, "v5e:1x1"),
        ("v6e-256", 256, "v6e:16x16"),
        ("v5p-64", 32, "v5p:2x4x4"),
        ("v4-8", 4, "v4:2x2x1"),
        ("v4-32", 16, "v4:2x2x4"),
        ("v5p:4x4x8", 128, "v5p:4x4x8"),
    ],
)
def test_names(text: str, chips: int, libtpu: str) -> None:
    topology = parse_topology(text)
    assert topology.chips == chips
    assert topology.libtpu_name == libtpu


def test_cpu_devices() -> None:
    assert parse_topology("cpu:8").chips == 8
    assert parse_topology("cpu-4").chip is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("v5e", "expected a name such as v5e-16"),
        ("v5e16", "expected a name such as v5e-16"),
        ("x100-8", "unknown chip 'x100'"),
        ("v5e-12", "the number of chips must be a power of two"),
        ("v4-7", "the number of cores, two per chip, must be a power of two"),
        ("v5e:4x4x4", "v5e chips form a torus of 2 dimensions"),
        ("cpu:2x2", "1 to 512 in a row"),
        ("cpu:0", "1 to 512 in a row"),
    ],
)
def test_what_there_is_not(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"--topology '{text}'.*{problem}"):
        parse_topology(text)


@given(st.sampled_from(sorted(CHIPS)), st.integers(0, 8))
def test_every_power_of_two_is_a_torus_of_that_many_chips(name: str, power: int) -> None:
    chip = CHIPS[name]
    topology = parse_topology(f"{name}-{2**power * chip.cores}")
    assert topology.chips == 2**power
    assert max(topology.shape) <= 2 * max(min(topology.shape), 2**power // max(topology.shape) or 1) or power < 2


def test_larger_groups_use_more_links_and_lines_half_of_them() -> None:
    v5e, v5p = parse_topology("v5e:4x4"), parse_topology("v5p:4x4x4")
    one = CHIPS["v5e"].link_bandwidth
    assert v5e.bandwidth(4) == one / 2  # no ring below 16 chips
    assert v5e.bandwidth(16) == one
    assert parse_topology("v5e:16x16").bandwidth(16) == one
    assert v5p.bandwidth(4) == CHIPS["v5p"].link_bandwidth
    assert v5p.bandwidth(64) == 3 * CHIPS["v5p"].link_bandwidth
