"""Reads the text of a compiled XLA program (``compiled.as_text()``): computations, operations, loops and their trip counts.

The grammar is that of XLA's ``HloModule::ToString``; https://openxla.org/xla/operation_semantics describes the operations.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxft.errors import UserError

_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) .*\{\s*$")
_END = re.compile(r"\}(, execution_thread=.*)?")
_NAME = re.compile(r"%([^\s,(){}=]+)")
_LEAF = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\((\d+(?:,\d+)*)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_COMMENT = re.compile(r"/\*.*?\*/")  # long tuples number their parts: /*index=5*/
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_MOST_STEPS = 200_000  # a loop that runs longer is not followed to its end

Value = int | tuple["Value", ...] | None
"""What is known of a value before the program runs: an integer, a tuple of such, or nothing."""


@dataclass(frozen=True)
class Shape:
    """An array of one device."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""
    """What stands in braces: minor-to-major order, then tiles ``T(8,128)``, then the memory space ``S(1)``."""

    @property
    def bits(self) -> int:
        """Bits of one element; 0 for what holds no data (token, opaque). c64 counts both parts, as XLA names it."""
        if self.dtype in ("pred", "s8", "u8") or self.dtype.startswith("f8"):
            return 8
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return -(-self.size * self.bits // 8)

    @property
    def stored_bytes(self) -> int:
        """Bytes as laid out: a tile's sides round the minor dimensions up (https://openxla.org/xla/tiled_layout)."""
        tile = _TILE.search(self.layout)
        if tile is None or not self.dims:
            return self.bytes
        order = [int(d) for d in self.layout.split(":")[0].split(",") if d]
        dims = [self.dims[d] for d in order] if len(order) == len(self.dims) else list(self.dims[::-1])
        for i, side in enumerate(reversed(tile[1].split(","))):
            if i < len(dims):
                dims[i] = -(-dims[i] // int(side)) * int(side)
        return -(-math.prod(dims) * self.bits // 8)

    @property
    def space(self) -> int:
        """Memory it lives in. On a TPU 0 is HBM, 1 VMEM, 2 semaphores, 6 scalar memory."""
        found = _SPACE.search(self.layout)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Op:
    """One instruction."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Shape of the result; of its leaves, where it is a tuple."""
    inside: str
    """The text between the opcode's parentheses: operands, or the literal of a constant."""
    tail: str
    """The text after them: attributes, metadata, backend_config."""
    root: bool = False

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return () if self.opcode in ("constant", "parameter") else tuple(_NAME.findall(self.inside))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations it runs, branches in order. What it applies to single elements (of a reduction) is one too."""
        head = self.tail.split("backend_config=")[0]
        names: list[str] = []
        for key in ("calls", "to_apply", "body", "true_computation", "false_computation", "branch_computations"):
            found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[^\s,]+)", head)
            names += _NAME.findall(found[1]) if found else []
        return tuple(names)

    def attribute(self, key: str) -> str | None:
        """The text of an attribute, up to the next comma outside of brackets; None if it has none."""
        found = re.search(rf"(?:^|[\s,]){key}=", self.tail)
        return _balanced(self.tail, found.end()) if found else None

    def numbers(self, key: str) -> tuple[int, ...]:
        """An attribute such as ``dimensions={0,2}`` or ``index=1``."""
        return tuple(int(n) for n in re.findall(r"\d+", self.attribute(key) or ""))

    @property
    def op_name(self) -> str:
        """Where JAX made it, from the metadata; empty if the compiler made it."""
        found = _OP_NAME.search(self.tail)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom-call calls."""
        return (self.attribute("custom_call_target") or "").strip('"')


@dataclass(frozen=True)
class Computation:
    """A list of operations, in the order in which they are scheduled."""

    name: str
    ops: dict[str, Op]

    @functools.cached_property
    def root(self) -> Op:
        """The operation whose result is the computation's."""
        return next((op for op in self.ops.values() if op.root), list(self.ops.values())[-1])

    def shapes_of(self, op: Op) -> tuple[Shape, ...]:
        """Leaves of all operands of ``op``."""
        return tuple(shape for name in op.operands for shape in self.ops[name].shapes)


@dataclass(frozen=True)
class Run:
    """An operation that the device starts by itself (that is not inside a fusion), and how often in one run."""

    op: Op
    home: Computation
    times: float
    asynchronous: bool = False


Rank = Callable[[list[Run]], float | tuple[float, ...]]
"""How dear the operations of a branch are."""


@dataclass(frozen=True)
class Schedule:
    """What one run of a program executes."""

    runs: list[Run]
    unknown_trips: list[str]
    """While loops whose trip count could not be read; their bodies are counted once."""


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int = 1
    """On which it runs: partitions times replicas."""

    def inside(self, op: Op) -> Iterator[tuple[Op, Computation]]:
        """The operations of a fusion (or of anything else that calls), with those of fusions inside it."""
        for name in op.called:
            home = self.computations[name]
            for inner in home.ops.values():
                yield inner, home
                if inner.opcode in ("fusion", "call", "async-start"):
                    yield from self.inside(inner)

    def schedule(self, rank: Rank) -> Schedule:
        """What one run executes; of the branches of a conditional that with the largest ``rank``."""
        found = Schedule([], [])
        self._walk(self.entry, (), 1.0, False, rank, found)
        return found

    def _walk(
        self, home: Computation, args: tuple[Value, ...], times: float, asynchronous: bool, rank: Rank, found: Schedule
    ) -> None:
        known = _Known(self, home, args)

        def enter(name: str, args: tuple[Value, ...], times: float, asynchronous: bool, into: Schedule) -> None:
            self._walk(self.computations[name], args, times, asynchronous, rank, into)

        for op in home.ops.values():
            if op.opcode == "while":
                start = known.of(op.operands[0])
                trips = self.trips(op, start)
                if trips is None:
                    found.unknown_trips.append(op.name)
                enter(
                    op.called[0], (self._kept(op, start),), times * (1 if trips is None else trips), asynchronous, found
                )
            elif op.opcode == "conditional":
                branches = []
                for name, operand in zip(op.called, op.operands[1:], strict=True):
                    branch = Schedule([], [])
                    enter(name, (known.of(operand),), times, asynchronous, branch)
                    branches.append(branch)
                dearest = max(branches, key=lambda branch: rank(branch.runs))
                found.runs.extend(dearest.runs)
                found.unknown_trips.extend(dearest.unknown_trips)
            elif op.opcode == "call" or (op.opcode == "async-start" and op.called):
                inputs = tuple(known.of(name) for name in op.operands)
                enter(op.called[0], inputs, times, asynchronous or op.opcode == "async-start", found)
            else:
                found.runs.append(Run(op, home, times, asynchronous))

    def trips(self, loop: Op, start: Value) -> int | None:
        """How often a while loop runs its body: as annotated, or by running its counter from ``start``; None if unknown."""
        annotated = _KNOWN_TRIPS.search(loop.tail)
        if annotated:
            return int(annotated[1])
        condition = self.computations[_NAME.findall(loop.attribute("condition") or "")[0]]
        body = self.computations[loop.called[0]]
        for step in range(_MOST_STEPS):
            on = _Known(self, condition, (start,)).of(condition.root.name)
            if not isinstance(on, int):
                return None
            if not on:
                return step
            start = _Known(self, body, (start,)).of(body.root.name)
        return None

    def _kept(self, loop: Op, start: Value) -> Value:
        """What is known of a loop's state in every iteration: the parts of ``start`` that the body passes on unchanged."""
        body = self.computations[loop.called[0]]
        if not isinstance(start, tuple) or body.root.opcode != "tuple":
            return None

        def unchanged(i: int, name: str) -> bool:
            op = body.ops[name]
            while op.opcode in ("copy", "bitcast"):
                op = body.ops[op.operands[0]]
            return (
                op.opcode == "get-tuple-element"
                and op.numbers("index") == (i,)
                and (body.ops[op.operands[0]].opcode == "parameter")
            )

        pairs = enumerate(zip(start, body.root.operands, strict=True))
        return tuple(value if unchanged(i, name) else None for i, (value, name) in pairs)


class _Known:
    """Values of a computation that follow from ``args``, its parameters, without running it: integer scalars only."""

    def __init__(self, program: Program, home: Computation, args: tuple[Value, ...]) -> None:
        self.program, self.home, self.args = program, home, args
        self._memo: dict[str, Value] = {}

    def of(self, name: str) -> Value:
        if name not in self._memo:
            self._memo[name] = self._evaluate(self.home.ops[name])
        return self._memo[name]

    def _evaluate(self, op: Op) -> Value:
        if op.opcode == "parameter":
            i = int(op.inside)
            return self.args[i] if i < len(self.args) else None
        if op.opcode == "tuple":
            return tuple(self.of(name) for name in op.operands)
        if op.opcode == "get-tuple-element":
            whole, index = self.of(op.operands[0]), op.numbers("index")[0]
            return whole[index] if isinstance(whole, tuple) else None
        if op.opcode == "opt-barrier":
            return self.of(op.operands[0])
        if op.opcode == "while":
            return self.program._kept(op, self.of(op.operands[0]))
        if len(op.shapes) != 1 or op.shapes[0].size != 1 or op.shapes[0].dtype[0] not in "sup":
            return None
        if op.opcode == "constant":
            return _integer(op.inside)
        if op.opcode in ("fusion", "call"):
            inner = self.program.computations[op.called[0]]
            return _Known(self.program, inner, tuple(self.of(name) for name in op.operands)).of(inner.root.name)
        return self._arithmetic(op)

    def _arithmetic(self, op: Op) -> Value:
        values: list[int] = []
        for name in op.operands:
            value = self.of(name)
            if not isinstance(value, int):
                return None
            values.append(value)
        key = f"{op.opcode} {op.attribute('direction')}" if op.opcode == "compare" else op.opcode
        return int(_ARITHMETIC[key](*values)) if key in _ARITHMETIC else None


_ARITHMETIC: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("copy", "bitcast", "convert", "reshape"), lambda a: a),
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "clamp": lambda low, a, high: min(max(low, a), high),
    "and": operator.and_,
    "or": operator.or_,
    "select": lambda which, a, b: a if which else b,
    **{f"compare {way}": getattr(operator, way.lower()) for way in ("EQ", "NE", "LT", "LE", "GT", "GE")},
}


def _integer(literal: str) -> int | None:
    literal = literal.strip("{} ")
    if literal in ("true", "false"):
        return int(literal == "true")
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None


def _depths(text: str, start: int) -> Iterator[tuple[int, str, int]]:
    """(index, character, brackets open after it) from ``start`` on, without what stands in quotes."""
    depth, quoted, escaped = 0, False, False
    for i in range(start, len(text)):
        c = text[i]
        if c == '"' and not escaped:
            quoted = not quoted
        elif not quoted:
            depth += (c in "([{") - (c in ")]}")
            yield i, c, depth
        escaped = c == "\\" and not escaped


def _balanced(text: str, start: int) -> str:
    """``text`` from ``start`` up to the first comma or closing bracket outside of brackets and quotes."""
    ends = (i for i, c, depth in _depths(text, start) if depth < 0 or (c == "," and depth == 0))
    return text[start : next(ends, len(text))]


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    for i, _, depth in _depths(text, start):
        if depth == 0:
            return i
    raise UserError(f"not the text of a compiled program: a parenthesis stays open in {text[:120]!r}")


def shapes_in(text: str) -> tuple[Shape, ...]:
    """The array shapes in a type, in order: ``(f32[2,3]{1,0}, s32[])`` has two."""
    text = _COMMENT.sub("", text)
    # A dimension that may be smaller at run time is written <=8.
    return tuple(
        Shape(dtype, tuple(int(d.strip("<=? ")) for d in dims.split(",") if d.strip("<=? ")), layout or "")
        for dtype, dims, layout in _LEAF.findall(text)
    )


def _op(line: str) -> Op:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end + 1)
    if opcode is None:
        raise UserError(f"not an operation of a compiled program: {line[:120]!r}")
    close = _closing(rest, opcode.end() - 1)
    inside = (
        re.sub(r"/\*.*?\*/", "", rest[opcode.end() : close])
        if "/*" in rest[opcode.end() : close]
        else rest[opcode.end() : close]
    )
    return Op(name.lstrip("%"), opcode[1], shapes_in(rest[:end]), inside, rest[close + 1 :].lstrip(", "), root)


def read_program(text: str) -> Program:
    """The program whose ``as_text()`` is given.

    Raises:
      UserError: the text is something else.
    """
    computations: dict[str, Computation] = {}
    entry, lines, name, devices = None, [], None, 1
    for line in text.splitlines():
        if line.startswith("HloModule "):
            devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line))
            continue
        if name is None:
            header = _HEADER.match(line) if line[:1] in ("%", "E") else None
            if header:
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif _END.fullmatch(line):
            ops = (_op(each) for each in lines)
            computations[name] = Computation(name, {op.name: op for op in ops})
            name = None
        else:
            stripped = line.strip()
            if stripped.startswith(("%", "ROOT %")):
                lines.append(stripped)
            elif lines:  # the rows of a matrix constant, or the metadata of a Pallas kernel
                lines[-1] += " " + stripped
    if entry is None or entry not in computations:
        raise UserError("not the text of a compiled program: it has no ENTRY computation")
    return Program(computations, computations[entry], devices)
