"""Counts what a compiled program does: what it sends between devices, its matmul FLOPs, the compiler's own cycle estimates."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxft.planning.hlo.groups import group_of
from jaxft.planning.hlo.library_calls import library_flops
from jaxft.planning.hlo.program import Computation, Op, Program, Run, Shape, read_program

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
# Collectives that TPU spreads over the matmuls between start and done carry this where they appear: at the start, in every
# fusion that they run beside, and at the end.
_SPREAD = '"async_collective_fusion_config"'
_START = "AsyncCollectiveStart"
# Custom calls that only name or view memory, or mark something.
_FREE_TARGETS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AsyncCollective",
    "Sharding",
    "SPMD",
    "annotate",
    "AssumeGather",
    "MoveTo",
)
# What costs nothing by itself, or runs beside the rest.
_FREE_OPS = (
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "partition-id",
        "replica-id",
        "after-all",
        "domain",
    ),
    *("opt-barrier", "async-update", "add-dependency", "reshape", "async-start", "async-done"),
)


@dataclass(frozen=True)
class Collective:
    """An exchange between devices that the program makes."""

    kind: str
    """all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute."""
    count: float
    """Executions in one run of the program."""
    bytes: int
    """Bytes of a whole group's tensor in one execution: what an all-gather yields, what the others take from a device."""
    wire_bytes: float
    """What one device sends in one execution, in a ring."""
    group: int
    """Devices that exchange with each other."""
    asynchronous: bool
    """Whether other operations run between its start and its end."""
    dtype: str
    shape: tuple[int, ...]
    """Shape of the largest tensor, if one execution takes several."""
    where: str
    """The line of JAX that asked for it, shortened; the operation's name if the compiler made it."""
    span: int
    """Devices from the first to the last of a group, in the order of the mesh: ``group`` where they are neighbours."""
    name: str
    """Name of the operation that makes or starts it."""


@dataclass(frozen=True)
class Costs:
    """What one run of a compiled program does on each device."""

    collectives: tuple[Collective, ...]
    matmul_flops: float
    """2 m n k of each dot, convolution, and call of cuBLAS or cuDNN's attention; in other custom calls (Pallas) not seen."""
    estimated_cycles: float
    """The TPU compiler's estimates added up; 0 if it made none. Collectives and custom calls have none."""
    unpriced: tuple[str, ...]
    """``name (kind)`` of operations that cost time but have no estimate."""
    unknown_trips: tuple[str, ...]
    """While loops whose trip count could not be read; their bodies are counted once."""


def costs_of(text: str) -> Costs:
    """What a program does, from its ``as_text()``. Of the branches of a conditional the dearest counts.

    Raises:
      UserError: the text is not that of a compiled program.
    """
    program = read_program(text)

    def rank(runs: list[Run]) -> tuple[float, ...]:
        return sum(map(cycles_of, runs)), sum(run.times * flops_of(program, run) for run in runs), len(runs)

    schedule = program.schedule(rank)
    cycles = sum(map(cycles_of, schedule.runs))
    return Costs(
        tuple(collectives_of(program, schedule.runs)),
        sum(run.times * flops_of(program, run) for run in schedule.runs),
        cycles,
        tuple(
            f"{r.op.name} ({r.op.target or r.op.opcode})" for r in schedule.runs if _is_unpriced(program, r, cycles > 0)
        ),
        tuple(schedule.unknown_trips),
    )


def estimate_of(op: Op) -> int | None:
    """Cycles of one execution by the compiler's estimate; None if it has none."""
    found = _ESTIMATE.search(op.tail)
    return int(found[1]) if found else None


def cycles_of(run: Run) -> float:
    """Estimated cycles of all executions; 0 without an estimate."""
    return run.times * (estimate_of(run.op) or 0)


def is_free(op: Op) -> bool:
    """Whether an operation takes no time of its own: it names memory, or only starts or awaits what runs beside the rest."""
    if op.opcode == "custom-call":
        return op.target.startswith(_FREE_TARGETS)
    return op.opcode in _FREE_OPS or op.opcode.endswith(("-start", "-done"))


def _is_unpriced(program: Program, run: Run, estimated: bool) -> bool:
    op = run.op
    if is_free(op) or kind_of(op) or estimate_of(op) is not None:
        return False
    if op.opcode == "fusion" and any(kind_of(inner) for inner, _ in program.inside(op)):
        return False
    # A scalar is a handful of cycles. Without any estimate the program is not a TPU's, and only opaque calls are told.
    large = any(shape.size > 1 for shape in op.shapes)
    return op.opcode == "custom-call" or (estimated and large)


def kind_of(op: Op) -> str | None:
    """The kind of collective that an operation is or starts; None if it is none."""
    name = op.opcode.removesuffix("-start")
    return name.removeprefix("ragged-") if name in _KINDS else None


def collectives_of(program: Program, runs: list[Run]) -> Iterator[Collective]:
    """The collectives among ``runs``, those inside fusions included."""
    inside = [
        (run, op, home)
        for run in runs
        if run.op.opcode == "fusion"
        for op, home in program.inside(run.op)
        if kind_of(op)
    ]
    started = {op.attribute("channel_id") for _, op, home in inside if _starts(home)}
    seen: set[tuple[str, str | None, str]] = set()
    for run, op, home in inside:
        if _SPREAD not in op.tail:
            yield _collective(program, run, op, home, run.asynchronous)
            continue
        channel = op.attribute("channel_id")
        key = (op.opcode, channel, run.home.name)
        if _starts(home) or (channel not in started and key not in seen):
            yield _collective(program, run, op, home, True)
        seen.add(key)
    for run in runs:
        if kind_of(run.op):
            beside = run.asynchronous or run.op.opcode.endswith("-start")
            yield _collective(program, run, run.op, run.home, beside)


def _starts(home: Computation) -> bool:
    return any(op.target == _START for op in home.ops.values() if op.opcode == "custom-call")


def _collective(program: Program, run: Run, op: Op, home: Computation, asynchronous: bool) -> Collective:
    kind = kind_of(op)
    assert kind is not None
    # On TPU a reduce-scatter is a fusion of an all-reduce and the slice of it that the device keeps.
    if (
        kind == "all-reduce"
        and home is not run.home
        and any(o.opcode == "dynamic-slice" and op.name in o.operands for o in home.ops.values())
    ):
        kind = "reduce-scatter"
    operands, (group, span) = home.shapes_of(op), group_of(program, op)
    if kind == "all-gather":
        (axis,) = op.numbers("dimensions")
        operands = tuple(
            Shape(s.dtype, tuple(d * group if i == axis else d for i, d in enumerate(s.dims)), s.layout)
            for s in operands
        )
    size = sum(shape.bytes for shape in operands)
    factor = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1.0}.get(kind, (group - 1) / group)
    largest = max(operands, key=lambda shape: shape.bytes)
    where = where_of(op if op.op_name else run.op)
    return Collective(
        kind, run.times, size, factor * size, group, asynchronous, largest.dtype, largest.dims, where, span, op.name
    )


def where_of(op: Op) -> str:
    """``op_name`` without the outer jit, the latter part of it if it is long; the operation's own name if it has none."""
    steps = [s for s in op.op_name.split("/") if s not in ("while", "body", "closed_call", "eval_jaxpr")]
    name = "/".join(steps[1:] if len(steps) > 1 and steps[0].startswith("jit(") else steps) or op.name
    return name if len(name) <= 80 else "..." + name[-77:]


def flops_of(program: Program, run: Run) -> float:
    """Matmul FLOPs of one execution of an operation, what is fused into it included."""
    parts: list[tuple[Op, Computation]] = [(run.op, run.home)]
    if run.op.opcode == "fusion":
        parts += program.inside(run.op)
    return float(sum(op_flops(op, home) for op, home in parts))


def op_flops(op: Op, home: Computation) -> float:
    """Matmul FLOPs of one operation by itself, without what it calls."""
    if op.opcode == "custom-call":
        return library_flops(op, home)
    if op.opcode == "dot":
        left = home.shapes_of(op)[0]
        return 2 * op.shapes[0].size * math.prod(left.dims[i] for i in op.numbers("lhs_contracting_dims"))
    return _convolution_flops(op, home) if op.opcode == "convolution" else 0


def _convolution_flops(op: Op, home: Computation) -> int:
    """Products of a padding or dilation zero do not count, as in XLA's HloCostAnalysis: TPU writes batched dots that way."""
    left, right = (shape.dims for shape in home.shapes_of(op)[:2])
    of_left, of_right, of_out = re.findall(r"[a-z0-9]+", op.attribute("dim_labels") or "")
    out = op.shapes[0].dims
    window = dict(re.findall(r"(\w+)=([-\dx_]+)", op.attribute("window") or ""))

    def per_axis(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(re.findall(r"\d", of_left))

    positions = 1
    spatial = zip(
        per_axis("size", "1"), per_axis("stride", "1"), per_axis("pad", "0_0"),
        per_axis("lhs_dilate", "1"), per_axis("rhs_dilate", "1"), strict=True,
    )  # fmt: skip
    for i, (size, stride, pad, spread, step) in enumerate(spatial):
        axis = str(i)
        low = int(pad.split("_")[0])
        positions *= _hits(
            int(size), out[of_out.index(axis)], left[of_left.index(axis)], int(stride), low, int(spread), int(step)
        )
    features = left[of_left.index("f")] // int(op.attribute("feature_group_count") or 1)
    batch = left[of_left.index("b")] // int(op.attribute("batch_group_count") or 1)
    return 2 * features * right[of_right.index("o")] * batch * positions


@functools.lru_cache(maxsize=4096)
def _hits(kernel: int, out: int, size: int, stride: int, low: int, spread: int, step: int) -> int:
    """Pairs of an output and a kernel position that meet an element of the input, of ``size``, itself ``spread`` out."""
    if low == 0 and spread == 1 and (out - 1) * stride + (kernel - 1) * step < size:
        return out * kernel
    positions = (o * stride - low + k * step for o in range(out) for k in range(kernel))
    return sum(p % spread == 0 and 0 <= p // spread < size for p in positions)
