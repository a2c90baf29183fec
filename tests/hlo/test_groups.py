"""Who exchanges with whom, in each way of writing it."""

from __future__ import annotations

import pytest

from jaxft.planning.hlo.costs import costs_of

PROGRAM = """HloModule m, num_partitions=16

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %sum = f32[16]{{0}} {op}(%x), {groups}, metadata={{op_name="jit(f)/psum"}}
}}
"""
MESH = "replica_groups=mesh['slice'=2,'data'=2,'x'=4] "


@pytest.mark.parametrize(
    ("groups", "group", "span"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", 4, 4),
        ("replica_groups={{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", 2, 9),
        ("replica_groups=[4,4]<=[16]", 4, 4),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", 2, 9),  # 0 and 8
        ("replica_groups=[4,4]<=[2,2,4]T(1,2,0)", 4, 10),  # 0, 8, 1, 9
        ("replica_groups={}", 16, 16),
        (MESH + "{'x'}", 4, 4),
        (MESH + "{'slice'}", 2, 9),
        (MESH + "{'slice','x'}", 8, 12),  # 0 to 3, 8 to 11
        (MESH + "{'x':(1)2}", 2, 3),  # 0 and 2: the first factor of x is the slow one
        (MESH + "{'x':(2)2}", 2, 2),
    ],
)
def test_groups(groups: str, group: int, span: int) -> None:
    (one,) = costs_of(PROGRAM.format(op="all-reduce", groups=groups)).collectives
    assert (one.group, one.span) == (group, span)


@pytest.mark.parametrize(
    ("pairs", "group", "span"),
    [("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", 4, 4), ("{{0,8},{8,0},{1,9},{9,1}}", 2, 9)],
)
def test_permutations(pairs: str, group: int, span: int) -> None:
    (one,) = costs_of(PROGRAM.format(op="collective-permute", groups=f"source_target_pairs={pairs}")).collectives
    assert (one.group, one.span) == (group, span)
