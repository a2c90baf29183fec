"""How fast a compiled program could be at most: each operation at the peak of matrix units or of memory, whichever takes longer.

Williams et al. 2009, "Roofline". For programs whose compiler states no times (GPUs). Not an estimate: no kernel reaches the peaks,
launches and gaps between operations cost time too, and kernels compute besides matrix products. Nothing is taken to stay in a
cache from one operation to the next: where it does, an operation may be faster than this. Exchanges are priced elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxft.planning.hlo.costs import is_free, kind_of, op_flops, where_of
from jaxft.planning.hlo.library_calls import is_library_call
from jaxft.planning.hlo.program import Computation, Op, Program, Run, read_program

# The second is started, and shares the memory's bandwidth with what runs beside it.
_FUSIONS = ("fusion", "fusion-start")
# The same bytes under another shape.
_VIEWS = ("bitcast", "reshape")
# They read as much of their first operand as they yield.
_SLICES = ("slice", "dynamic-slice", "gather")
# They change a part of their first operand, in place: the operand that holds the part.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# As a dot writes it, and as a call of cuBLAS: operand_precision={highest,highest}, "operand_precision":["HIGHEST","HIGHEST"].
_EXACT = re.compile(r'operand_precision"?[=:]\s*[{\[]"?high', re.IGNORECASE)


@dataclass(frozen=True)
class Peaks:
    """What one device can do."""

    bf16: float
    """FLOP/s of matrix products of 16-bit operands."""
    tf32: float
    """FLOP/s of float32 operands that may be rounded (precision DEFAULT)."""
    float32: float
    """FLOP/s of float32 operands that may not be rounded (HIGH, HIGHEST)."""
    bytes_per_second: float
    """Bandwidth of its memory."""


@dataclass(frozen=True)
class OpBound:
    """The least that one operation takes."""

    name: str
    where: str
    times: float
    seconds: float
    """Seconds of one execution."""
    by_matmul: bool
    """Whether its products take longer than its bytes."""


@dataclass(frozen=True)
class Roofline:
    """The least that one run of a program takes, exchanges left out."""

    ops: tuple[OpBound, ...]
    opaque: tuple[str, ...]
    """``name (target)`` of custom calls of which only the bytes count: nothing says what they compute."""
    beside: dict[str, float]
    """Seconds of the operations between the start and the end of one execution of an exchange, by the name of what starts it."""
    unknown_trips: tuple[str, ...]
    """While loops whose trip count could not be read; their bodies are counted once."""

    @property
    def seconds(self) -> float:
        """Seconds of the operations one after the other."""
        return sum(op.times * op.seconds for op in self.ops)

    @property
    def matmul_share(self) -> float:
        """Share of the seconds that products decide."""
        return sum(op.times * op.seconds for op in self.ops if op.by_matmul) / (self.seconds or 1.0)


def roofline_of(text: str, peaks: Peaks) -> Roofline:
    """The roofline of a program, from its ``as_text()``. Of the branches of a conditional the dearest counts.

    Raises:
      UserError: the text is not that of a compiled program.
    """
    program = read_program(text)

    def rank(runs: list[Run]) -> float:
        return sum(run.times * _bound(program, run, peaks).seconds for run in runs if _counts(run.op))

    schedule = program.schedule(rank)
    bounds = [_bound(program, run, peaks) if _counts(run.op) else None for run in schedule.runs]
    calls = (run.op for run in schedule.runs if run.op.opcode == "custom-call" and _counts(run.op))
    return Roofline(
        tuple(bound for bound in bounds if bound is not None),
        tuple(f"{op.name} ({op.target})" for op in calls if not is_library_call(op)),
        _beside(schedule.runs, bounds),
        tuple(schedule.unknown_trips),
    )


def _beside(runs: list[Run], bounds: list[OpBound | None]) -> dict[str, float]:
    clock, started, found = 0.0, {}, {}
    for run, bound in zip(runs, bounds, strict=True):
        op = run.op
        if bound is not None:
            clock += bound.times * bound.seconds
        elif kind_of(op) and op.opcode.endswith("-start"):
            started[op.name] = clock
        elif op.opcode.endswith("-done") and op.operands[0] in started:
            found[op.operands[0]] = (clock - started[op.operands[0]]) / run.times
    return found


def _counts(op: Op) -> bool:
    return op.opcode in _FUSIONS or not (is_free(op) or kind_of(op))


def _bound(program: Program, run: Run, peaks: Peaks) -> OpBound:
    products = matmul_seconds(program, run, peaks)
    memory = bytes_moved(program, run) / peaks.bytes_per_second
    return OpBound(run.op.name, where_of(run.op), run.times, max(products, memory), products > memory)


def matmul_seconds(program: Program, run: Run, peaks: Peaks) -> float:
    """Seconds of one execution's products at the peak for their operands, with what is fused into it."""
    parts = [(run.op, run.home), *(program.inside(run.op) if run.op.opcode in _FUSIONS else ())]
    return sum(flops / _peak(op, home, peaks) for op, home in parts if (flops := op_flops(op, home)))


def _peak(op: Op, home: Computation, peaks: Peaks) -> float:
    if home.shapes_of(op)[0].dtype != "f32":
        return peaks.bf16
    return peaks.float32 if _EXACT.search(op.tail) else peaks.tf32


def bytes_moved(program: Program, run: Run) -> int:
    """Bytes that one execution reads from memory and writes to it."""
    op, home = run.op, run.home
    operands = {name: max(_read(program, op, home, i) for i in places) for name, places in _places(op).items()}
    return sum(operands.values()) + _written(program, op, home)


def _places(op: Op) -> dict[str, list[int]]:
    """Where each operand stands: one that stands in two places is read once."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(op.operands):
        places.setdefault(name, []).append(i)
    return places


def _read(program: Program, op: Op, home: Computation, place: int) -> int:
    """Bytes that an operation reads of its operand at ``place``."""
    whole = sum(shape.bytes for shape in home.ops[op.operands[place]].shapes)
    if op.opcode in _FUSIONS:
        inner = program.computations[op.called[0]]
        parameter = next(o for o in inner.ops.values() if o.opcode == "parameter" and int(o.inside) == place)
        return min(whole, sum(_taken(program, inner, parameter)))
    if place == 0 and op.opcode in _SLICES:
        return sum(shape.bytes for shape in op.shapes)
    if place == 0 and op.opcode in _UPDATES:
        # A scatter adds to what is there; an update only overwrites it.
        return _part(op, home) if op.opcode == "scatter" else 0
    return whole


def _taken(program: Program, home: Computation, value: Op) -> Iterator[int]:
    """Bytes that each user of a value inside a fusion reads of it."""
    for user in home.ops.values():
        for place, name in enumerate(user.operands):
            if name == value.name:
                if user.opcode in _VIEWS:
                    yield from _taken(program, home, user)
                else:
                    yield _read(program, user, home, place)


def _written(program: Program, op: Op, home: Computation, fused: bool = False) -> int:
    """Bytes of an operation's results, of one that is changed in place only the part."""
    if op.opcode in _FUSIONS:
        inner = program.computations[op.called[0]]
        root = inner.root
        roots = [inner.ops[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return sum(_written(program, each, inner, fused=True) for each in roots)
    if fused and op.opcode in _VIEWS:
        return _written(program, home.ops[op.operands[0]], home, fused)
    if op.opcode in _UPDATES and (not fused or _is_parameter(home.ops[op.operands[0]], home)):
        return _part(op, home)
    if op.opcode == "parameter":  # a fusion that passes it on writes nothing
        return 0
    # The libraries' workspaces come as further results, of bytes; what is written there, nobody says.
    workspaces = ("s8", "u8") if op.opcode == "custom-call" and is_library_call(op) else ()
    return sum(shape.bytes for shape in op.shapes if shape.dtype not in workspaces)


def _is_parameter(op: Op, home: Computation) -> bool:
    """Whether a value inside a fusion lies in memory already; else a change of it makes a new array."""
    while op.opcode in _VIEWS:
        op = home.ops[op.operands[0]]
    return op.opcode == "parameter"


def _part(op: Op, home: Computation) -> int:
    return sum(shape.bytes for shape in home.ops[op.operands[_UPDATES[op.opcode]]].shapes)
