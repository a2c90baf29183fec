"""Advice and tables of a plan: nothing is advised that does not help, and parts add up to their total."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from tiny_plan import SMALL, options, plan, recipe_of

from jaxft.config import load_config
from jaxft.machine.chips import parse_topology
from jaxft.planning.advice import advice_for
from jaxft.planning.hlo import Collective
from jaxft.planning.measure import Memory, Plan, make_plan
from jaxft.planning.table import plan_text

_MIB = 2**20


def reduced(mib: float, kind: str = "all-reduce") -> Collective:
    size = int(mib * _MIB)
    return Collective(kind, 1, size, size, 8, False, "f32", (size // 4,), "grad", 8, "op")


def compiled(topology: str, *mesh: str, exchanges: tuple[Collective, ...], traffic: dict[str, float]) -> Plan:
    """A plan by formulas of a small model, made out as one that was compiled, with exchanges of the test's own."""
    found = make_plan(recipe_of(SMALL), parse_topology("cpu:8"), 32, 64, compiled=False)
    sizes = {key.removeprefix("mesh."): int(value) for key, value in (item.split("=") for item in mesh)}
    zeros = dict.fromkeys(found.traffic.__dict__, 0.0)
    return dataclasses.replace(
        found,
        source="compiled",
        topology=parse_topology(topology),
        mesh={axis: size for axis, size in sizes.items() if size > 1},
        traffic=dataclasses.replace(found.traffic, **(zeros | {k: v * _MIB for k, v in traffic.items()})),
        collectives=exchanges,
        memory=dataclasses.replace(found.memory, limit=15.75 * 2**30),
        split_percent=99.0,
    )


def of_weights(found: Plan, *mesh: str) -> list[str]:
    config = load_config(None, options(*mesh))
    return [line for line in advice_for(found, config) if line.startswith("all-reduces send")]


def test_the_layout_that_is_advised_is_another_one_than_is_there() -> None:
    # The README's own example: mesh.fsdp=8 on 16 chips, some small gradients summed up whole.
    mesh = ("mesh.data=2", "mesh.fsdp=8")
    traffic = {"weights_gathered": 80.0, "gradients_scattered": 70.0, "gradients_reduced": 10.0}
    small = compiled("v5e-16", *mesh, exchanges=(reduced(40), reduced(110, "all-gather")), traffic=traffic)
    (line,) = of_weights(small, *mesh)
    assert line.startswith("all-reduces send 40 MiB where 10 would do")
    assert "mesh.fsdp=8" not in line
    assert line.endswith("(libtpu does so with those below 4 MiB, where that is faster)")
    # fsdp over all 16: eight ways, the rest to data.
    wide = compiled("v5e-16", "mesh.fsdp=16", exchanges=(reduced(40),), traffic=traffic)
    assert of_weights(wide, "mesh.fsdp=16")[0].endswith("; try mesh.fsdp=8 mesh.data=2")
    # What sends less, where whole parameters fit.
    much = compiled("v5e-16", *mesh, exchanges=(reduced(400), reduced(110, "all-gather")), traffic=traffic)
    (line,) = of_weights(much, *mesh)
    assert "; with mesh.fsdp=1 mesh.data=16 all of them are, yet chips send 150 MiB in all instead of 510" in line
    full = dataclasses.replace(much, memory=dataclasses.replace(much.memory, limit=float(much.memory.total)))
    assert "mesh.fsdp=1" not in of_weights(full, *mesh)[0]
    # As the textbook has it: nothing to say. Nor of CPUs, whose compiler scatters nothing.
    assert of_weights(compiled("v5e-16", *mesh, exchanges=(reduced(10),), traffic=traffic), *mesh) == []
    assert of_weights(compiled("cpu:16", *mesh, exchanges=(reduced(400),), traffic=traffic), *mesh) == []


def _rows(text: str) -> dict[str, float]:
    table = text.split("memory per chip", 1)[1].split("\n\n", 1)[0]
    return {m[1].strip(): float(m[2]) for m in re.finditer(r"^(\S.*?) +(-?[\d.]+)(?:  |$)", table, re.M)}


@pytest.mark.parametrize("case", ["analytic", "compiled", "refused"])
def test_the_parts_of_the_memory_add_up(case: str) -> None:
    gib = 2**30
    sizes: dict[str, Any] = {"parameters": gib, "optimizer": 2 * gib, "average": 0, "batch": gib // 4, "program": 0}
    sizes |= {"gradients": gib, "activations": 3.0 * gib, "temporaries": 4.0 * gib, "total": 7.25 * gib, "limit": None}
    if case == "compiled":  # it needs less than formulas say
        sizes |= {"temporaries": 1.5 * gib, "program": gib // 8, "total": 5.125 * gib}
    if case == "refused":
        sizes |= {"total": 30.0 * gib, "limit": 15.75 * gib}
    found = make_plan(recipe_of(SMALL), parse_topology("cpu:8"), 32, 64, compiled=False)
    found = dataclasses.replace(found, memory=Memory(**sizes), source="compiled" if case == "compiled" else "analytic")
    rows = _rows(plan_text(found, []))
    total = rows.pop("total")
    assert total == pytest.approx(sizes["total"] / gib, abs=1e-3)
    parts = {name: size for name, size in rows.items() if not name.startswith("(")}
    assert sum(parts.values()) == pytest.approx(total, abs=4e-3)
    assert ("other" in parts) == (case == "compiled")
    assert ("(activations)" in rows) == (case != "analytic")


def test_formulas_show_their_exchanges_and_the_exit_code_says_what_does_not_fit() -> None:
    base = options("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "data.max_length=64")
    out, _ = plan(*base, "--topology", "v5e-8", "--analytic")
    for row in (r"weights gathered +all-gather +fsdp 2 +[\d.]+", r"gradients scattered +reduce-scatter +fsdp 2 +[\d.]+",
                r"gradients reduced +all-reduce +data 2 +[\d.]+", r"tensor parallel +all-reduce +tensor 2 +[\d.]+",
                r"total +[\d.]+"):  # fmt: skip
        assert re.search(row, out), row
    huge = options("train.batch_size=1048576", "data.max_length=64")
    out, _ = plan(*huge, "--topology", "v5e-8", "--analytic", code=6)
    assert "DOES NOT FIT" in out
    assert "advice" in out
    one, _ = plan(*options("data.max_length=64"), "--topology", "cpu:1", "--analytic")
    assert "exchanges per step, by formula: none" in one
