"""Names of GPU clusters, what their links carry, and what the CUDA compiler is told of them."""

from __future__ import annotations

import re

import pytest

from jaxft.errors import UserError
from jaxft.machine.chips import parse_topology, peak_of
from jaxft.machine.gpus import GPUS, target_config
from jaxft.planning.measure import MEMORY_SHARE, usable_bytes

H100 = GPUS["h100"]


@pytest.mark.parametrize(
    ("text", "shape", "layout"),
    [
        ("h100-1", (1, 1), "1 node of 1"),
        ("h100-4", (1, 4), "1 node of 4"),
        ("h100-8", (1, 8), "1 node of 8"),
        ("h200-16", (2, 8), "2 nodes of 8"),
        ("a100-64", (8, 8), "8 nodes of 8"),
        ("h100:4x4", (4, 4), "4 nodes of 4"),
        ("h100:1x2", (1, 2), "1 node of 2"),
    ],
)
def test_names(text: str, shape: tuple[int, int], layout: str) -> None:
    topology = parse_topology(text)
    assert (topology.shape, topology.layout) == (shape, layout)
    assert topology.chips == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("h100-12", "one node has 1, 2, 4 or 8 GPUs, several have a multiple of 8"),
        ("h100-0", "one node has 1, 2, 4 or 8 GPUs"),
        ("h200-3", "one node has 1, 2, 4 or 8 GPUs"),
        ("h100:3", "expected h100:NODESxGPUS"),
        ("h100:2x3", "expected h100:NODESxGPUS with 1, 2, 4 or 8 GPUs"),
        ("h100:0x8", "expected h100:NODESxGPUS"),
        ("h100:2x2x2", "expected h100:NODESxGPUS"),
        ("h10-8", "unknown chip 'h10': did you mean 'h100'"),
    ],
)
def test_what_there_is_not(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"--topology '{text}'.*{problem}"):
        parse_topology(text)


@pytest.mark.parametrize(
    ("text", "group", "span", "bandwidth"),
    [
        ("h100-8", 8, None, 450e9),
        ("h100-64", 8, 8, 450e9),  # of one node
        ("h100-64", 64, None, 400e9),  # eight cards of a node carry eight rings
        ("h100-64", 8, 57, 50e9),  # one GPU of each node: its own card only
        ("h100-64", 16, 61, 100e9),  # two of each node
        ("h100-64", 2, 64, 50e9),
        ("h100:4x4", 16, None, 200e9),
        ("a100-64", 64, None, 200e9),
        ("a100-8", 4, None, 300e9),
    ],
)
def test_a_group_is_as_fast_as_the_slowest_part_of_its_way(
    text: str, group: int, span: int | None, bandwidth: float
) -> None:
    assert parse_topology(text).bandwidth(group, span) == bandwidth


@pytest.mark.parametrize(("span", "nodes"), [(8, 1), (2, 1), (9, 2), (57, 8), (64, 8)])
def test_nodes(span: int, nodes: int) -> None:
    assert parse_topology("h100-64").nodes(span) == nodes
    assert parse_topology("v5e-64").nodes(span) == 1


def test_jax_takes_three_quarters_of_a_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = parse_topology("h100-8")
    monkeypatch.delenv(MEMORY_SHARE, raising=False)
    assert usable_bytes(topology) == 0.75 * H100.hbm_bytes
    monkeypatch.setenv(MEMORY_SHARE, ".9")
    assert usable_bytes(topology) == 0.9 * H100.hbm_bytes
    assert usable_bytes(parse_topology("v5e-8")) == 15.75 * 2**30  # whatever is said of GPUs


@pytest.mark.parametrize("share", ["0", "75", "much", "nan"])
def test_nonsense_about_memory(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY_SHARE, share)
    with pytest.raises(UserError, match=f"{MEMORY_SHARE}='{share}': expected a share"):
        usable_bytes(parse_topology("h100-8"))


@pytest.mark.parametrize("name", GPUS)
def test_the_compiler_is_told_of_the_same_gpu(name: str) -> None:
    gpu, text = GPUS[name], target_config(GPUS[name])

    def number(key: str) -> float:
        (found,) = re.findall(rf"\b{key}: ([\d.]+)", text)
        return float(found)

    assert number("memory_bandwidth") == gpu.hbm_bandwidth
    assert number("device_memory_size") == pytest.approx(gpu.hbm_bytes, abs=1)
    # NVIDIA's peak of float32 is that of its cores: two operations per unit and cycle.
    peak = 2 * number("core_count") * number("fpus_per_core") * number("clock_rate_ghz") * 1e9
    assert peak == pytest.approx(gpu.float32_flops, rel=0.01)
    assert peak_of(f"{gpu.kind} 80GB HBM3") == gpu.flops
    assert text.count("{") == text.count("}")
