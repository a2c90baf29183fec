"""Which devices exchange with each other in a collective of a compiled program: how many, and how far apart they lie."""

from __future__ import annotations

import itertools
import math
import re

from jaxft.planning.hlo.program import Op, Program

# mesh['data'=2,'x'=4] {'x'}: the groups along some axes of a mesh, whole or in part: {'x':(1)2} is the first factor 2 of the 4.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")  # [4,2]<=[8]: four groups of two


def group_of(program: Program, op: Op) -> tuple[int, int]:
    """(devices of one group, how many lie from the first to the last of them, both counted) of a collective.

    Devices are numbered as the program numbers its partitions: in the order of the mesh. Of several groups, the first counts.
    """
    if "source_target_pairs=" in op.tail:
        path = _path(op.numbers("source_target_pairs"))
        return max(len(path), 1), _span(path)
    mesh = _MESH.search(op.tail)
    if mesh:
        return _of_mesh(mesh[1], mesh[2])
    groups = op.attribute("replica_groups") or "{}"
    iota = _IOTA.match(groups)
    first = re.match(r"\{\{([\d,]+)\}", groups)
    members = _of_iota(*iota.groups()) if iota else _numbers(first[1]) if first else list(range(program.devices))
    return len(members), _span(members)


def _of_mesh(sizes: str, used: str) -> tuple[int, int]:
    size_of = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", sizes)}
    stride_of, below = {}, 1
    for name in reversed(size_of):
        stride_of[name] = below
        below *= size_of[name]
    group, last = 1, 0
    for name, before, part in _AXIS.findall(used):
        size = int(part or size_of[name])
        stride = stride_of[name] * (size_of[name] // (int(before) * size) if part else 1)
        group, last = group * size, last + (size - 1) * stride
    return group, last + 1


def _of_iota(shape: str, sizes: str, order: str | None) -> list[int]:
    """The first group of ``[groups,each]<=[sizes]T(order)``."""
    dims = _numbers(sizes)
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    axes = _numbers(order) if order else list(range(len(dims)))
    places = itertools.product(*(range(dims[axis]) for axis in axes))  # the last of the axes varies fastest
    each = math.prod(_numbers(shape)[1:])
    return [
        sum(i * strides[axis] for i, axis in zip(place, axes, strict=True)) for place in itertools.islice(places, each)
    ]


def _path(numbers: tuple[int, ...]) -> list[int]:
    """Devices on one path of a permutation written as source, target, source, target, ..."""
    towards = dict(zip(numbers[::2], numbers[1::2], strict=True))
    heads = sorted(set(towards) - set(towards.values())) or sorted(towards)
    path = heads[:1]
    while path and path[-1] in towards and towards[path[-1]] != path[0]:
        path.append(towards[path[-1]])
    return path


def _span(members: list[int]) -> int:
    return max(members) - min(members) + 1 if members else 1


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
