"""Prices a compiled TPU program by the machine code of its operations: VLIW bundles, one a cycle, that libtpu writes on request.

Nothing runs. The price leaves out stalls inside an operation, its launch, and exchanges between devices. It charges
whatever stands behind a branch inside an operation, taken or not, and a loop there that depends on data once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxft.errors import UserError
from jaxft.planning.hlo.costs import flops_of, is_free, kind_of, where_of
from jaxft.planning.hlo.program import Computation, Op, Program, Run, Schedule, Shape, read_program

# What of the peaks is within reach: the shares with which an earlier pricing by this method came to 0.96 to 1.07 of the step
# times that MaxText publishes (three runs). Not measured again with this code.
OF_HBM = 0.85
OF_MATMUL = 0.93

# The environment in which libtpu compiles on a machine without a TPU; it reads it once, when a process loads it. Without the
# first, a second process that compiles at the same time fails on a lock file. The others keep it from asking the network what
# TPU this is, and from a page of complaints; the type need not be that of the topology.

_DELAY_SLOTS = 4  # bundles after a branch that run still
_FILE = re.compile(r"(\d+)-(.+)-\d\d-final_bundles\.txt")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(LB)?[A-Z ]*:[ >]*\{")
_REGION = re.compile(r"Start region (\d+)")
_BRANCH = re.compile(r"sbr\.\w+ .*?target = \$region(\d+)")
_EXIT = re.compile(r"scmp\.ge\.[\w.]+ %\S+, (\d+) /\* loop exit test")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
_BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')


@dataclass(frozen=True)
class ChipSpeed:
    """What one device of a program can do at its peak."""

    clock_hz: float
    hbm_bytes_per_second: float
    flops_per_second: float
    """FLOP/s of bf16 matrix products."""


@dataclass(frozen=True)
class OpPrice:
    """Where one operation's time goes."""

    name: str
    kind: str
    """matmul, fusion, custom call, other, or wait: for a copy between memories that was not finished in time."""
    times: float
    """Executions in one run of the program."""
    cycles: float
    """Cycles of one execution."""
    bound: str
    """What takes longest: bundles, memory or matmul."""
    where: str

    @property
    def total(self) -> float:
        """Cycles in one run of the program."""
        return self.times * self.cycles


@dataclass(frozen=True)
class LloPrice:
    """The price of one run of a program, without collectives."""

    cycles: float
    seconds: float
    by_kind: dict[str, float]
    """Cycles by :attr:`OpPrice.kind`, largest first."""
    ops: tuple[OpPrice, ...]
    """The dearest first."""
    without_bundles: tuple[str, ...]
    """Operations whose machine code was not found: their price is of memory and matmul alone."""
    data_dependent: tuple[str, ...]
    """Custom calls with loops of unknown length, counted once: they cost more than stated."""
    unknown_trips: tuple[str, ...]
    """While loops of the program whose trip count could not be read; their bodies are counted once."""


@dataclass(frozen=True)
class Bundles:
    """Machine code of one operation."""

    count: float
    """Bundles that one execution runs, loops multiplied."""
    open_loops: int
    """Loops whose length stands in a register, counted once."""


def llo_flags(folder: Path) -> str:
    """``LIBTPU_INIT_ARGS`` with which libtpu writes the machine code of what it compiles into ``folder``.

    It reads the variable once, when a process loads it.
    """
    label = "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {label}"


def llo_cycles(
    folder: Path, text: str, speed: ChipSpeed, of_hbm: float = OF_HBM, of_matmul: float = OF_MATMUL
) -> LloPrice:
    """The price of a program, from its ``as_text()`` and the ``folder`` that its compilation wrote.

    Args:
      folder: of one compilation only.
      of_hbm: share of peak HBM bandwidth that is within reach. of_matmul: the same of peak FLOPs.

    Raises:
      UserError: the folder holds no machine code, or the text is something else.
    """
    files = _files(folder)
    if not files:
        raise UserError(f"{folder}: no *-final_bundles.txt in it; was LIBTPU_INIT_ARGS set before libtpu was loaded?")
    program = read_program(text)
    pricer = _Pricer(program, files, speed, of_hbm, of_matmul)
    schedule = program.schedule(lambda runs: sum(run.times * pricer.price(run).cycles for run in runs))
    prices = sorted(pricer.prices(schedule), key=lambda price: -price.total)
    by_kind: dict[str, float] = defaultdict(float)
    for price in prices:
        by_kind[price.kind] += price.total
    cycles = sum(by_kind.values())
    return LloPrice(
        cycles,
        cycles / speed.clock_hz,
        dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        tuple(prices),
        tuple(sorted(pricer.without_bundles)),
        tuple(sorted(pricer.data_dependent)),
        tuple(schedule.unknown_trips),
    )


def _files(folder: Path) -> dict[str, Path]:
    """The newest file of each operation, by the operation's name."""
    found = sorted((int(m[1]), m[2], path) for path in folder.iterdir() if (m := _FILE.fullmatch(path.name)))
    return {name: path for _, name, path in found}


class _Pricer:
    """Prices of single operations. Remembers what it read, and what it had to do without."""

    def __init__(
        self, program: Program, files: dict[str, Path], speed: ChipSpeed, of_hbm: float, of_matmul: float
    ) -> None:
        self.program, self.files = program, files
        self.bytes_per_cycle = of_hbm * speed.hbm_bytes_per_second / speed.clock_hz
        self.flops_per_cycle = of_matmul * speed.flops_per_second / speed.clock_hz
        self.without_bundles: set[str] = set()
        self.data_dependent: set[str] = set()
        self._memory: dict[str, float] = {}
        self._known: dict[str, OpPrice] = {}
        self._bundles: dict[str, Bundles] = {}
        self._twins: dict[str, str] | None = None

    def prices(self, schedule: Schedule) -> Iterator[OpPrice]:
        """Prices every operation, and the waits for copies that run beside them but share the HBM's bandwidth."""
        # Copies under way, oldest first: [name, cycles left]. They get what bandwidth the operations leave.
        queues: dict[str, list[tuple[str, float]]] = defaultdict(list)
        times_of: dict[str, float] = {}
        for run in schedule.runs:
            op, home = run.op, run.home.name
            times_of[home] = run.times
            if _copies(op):
                queues[home].append((op.name, copied_bytes(op) / self.bytes_per_cycle))
            elif op.opcode.endswith("-done") and any(name == op.operands[0] for name, _ in queues[home]):
                until = [name for name, _ in queues[home]].index(op.operands[0]) + 1
                wait = sum(left for _, left in queues[home][:until])
                del queues[home][:until]
                if wait > 0:
                    yield OpPrice(op.name, "wait", run.times, wait, "memory", where_of(op))
            else:
                price = self.price(run)
                spare = max(price.cycles - self._memory.get(op.name, 0.0), 0.0)
                for name, queue in queues.items():
                    _drain(queue, spare * run.times / times_of[name] if times_of[name] else 0.0)
                if price.cycles:
                    yield price

    def price(self, run: Run) -> OpPrice:
        """Prices one operation; collectives and what is free cost 0."""
        if run.op.name not in self._known:
            self._known[run.op.name] = self._price(run)
        known = self._known[run.op.name]
        return OpPrice(known.name, known.kind, run.times, known.cycles, known.bound, known.where)

    def _price(self, run: Run) -> OpPrice:
        op, flops = run.op, flops_of(self.program, run)
        exchange = bool(kind_of(op)) or (op.opcode == "fusion" and any(kind_of(o) for o, _ in self.program.inside(op)))
        # Scalars are computed between the operations, on a unit of their own.
        scalar = op.opcode not in ("fusion", "custom-call") and all(shape.size <= 1 for shape in op.shapes)
        if is_free(op) or scalar or (exchange and not flops):
            return OpPrice(op.name, "free", run.times, 0.0, "", "")
        memory = self._memory[op.name] = hbm_bytes(self.program, op, run.home) / self.bytes_per_cycle
        bundles = self._bundles_of(run)
        parts = {"matmul": flops / self.flops_per_cycle, "memory": memory, "bundles": bundles.count if bundles else 0.0}
        bound = max(parts, key=lambda part: parts[part])
        kind = {"fusion": "fusion", "custom-call": "custom call"}.get(op.opcode, "other")
        return OpPrice(op.name, "matmul" if flops else kind, run.times, parts[bound], bound, where_of(op))

    def _bundles_of(self, run: Run) -> Bundles | None:
        op = run.op
        name = op.name if op.name in self.files else self._twin_of(op, run.home)
        if name is None:
            # Plain copies are left to the DMA engine: they have no code.
            if op.opcode != "copy":
                self.without_bundles.add(op.name)
            return None
        if name not in self._bundles:
            bounds = _BOUNDS.search(op.tail)
            steps = 1
            for bound in re.findall(r"\d+", bounds[1]) if bounds else []:
                steps *= int(bound)
            self._bundles[name] = bundles_in(self.files[name].read_text(errors="replace"), steps if bounds else None)
        if self._bundles[name].open_loops and op.opcode == "custom-call":
            self.data_dependent.add(op.name)
        return self._bundles[name]

    def _twin_of(self, op: Op, home: Computation) -> str | None:
        """An operation with code that is the same but for names: libtpu generates and writes it once for all of them."""
        if self._twins is None:
            self._twins = {
                _print_of(self.program, other, place): other.name
                for place in self.program.computations.values()
                for other in place.ops.values()
                if other.name in self.files
            }
        return self._twins.get(_print_of(self.program, op, home))


def _copies(op: Op) -> bool:
    """Whether an operation starts a copy between memories that runs beside others."""
    return op.opcode in ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")


def _drain(queue: list[tuple[str, float]], cycles: float) -> None:
    """Goes on with the copies for some cycles, oldest first. The finished ones stay: their -done looks for them."""
    for i, (name, left) in enumerate(queue):
        done = min(left, cycles)
        queue[i] = (name, left - done)
        cycles -= done


def _print_of(program: Program, op: Op, home: Computation) -> str:
    """The text of an operation and of what it calls, with positions in place of names."""
    parts = [op.opcode, str(op.shapes), str(home.shapes_of(op)), op.target]
    window = re.search(r'"window_config":\{.*?\}', op.tail)
    parts.append(window[0] if window else "")
    if op.opcode == "custom-call":
        parts.append(op.tail.split("backend_config=")[-1])
    for name in op.called:
        called = program.computations[name]
        places = {inner: f"%{i}" for i, inner in enumerate(called.ops)}
        for inner in called.ops.values():
            head = re.split(r"(?:^|, )(?:metadata|frontend_attributes|backend_config|calls|to_apply)=", inner.tail)[0]
            text = inner.inside if not inner.operands else " ".join(places[o] for o in inner.operands)
            parts += [inner.opcode, str(inner.shapes), text, head]
            if inner.called:
                parts.append(_print_of(program, inner, called))
    return "\n".join(parts)


def bundles_in(text: str, steps: int | None = None) -> Bundles:
    """Bundles that one execution of an operation runs, from its ``final_bundles`` file.

    Args:
      steps: iterations that compute, of the loop over windows, where the program tells: the loop itself runs some more, to
        fetch the first windows and to store the last.
    """
    weights: list[float] = []
    heads: list[tuple[int, set[str]]] = []  # loops that are open: first bundle, names
    exits: list[tuple[int, int]] = []  # bundle and bound of exit tests not yet used
    stages: list[int] = []
    open_loops = 0
    loops: list[tuple[int, int, float]] = []
    for line in text.split("control target key end")[-1].splitlines():
        bundle = _BUNDLE.match(line)
        if bundle:
            weights.append(1.0)
            if bundle[1]:
                heads.append((len(weights) - 1, set(_REGION.findall(line))))
        if not weights:
            continue
        here = len(weights) - 1
        if "loop exit test" in line and (found := _EXIT.search(line)):
            exits.append((here, int(found[1])))
        if "stage = " in line:
            stages += map(int, _STAGE.findall(line))
        for target in _BRANCH.findall(line) if "target = " in line else ():
            head = next((i for i in reversed(range(len(heads))) if target in heads[i][1]), None)
            if head is None:
                continue
            first = heads[head][0]
            del heads[head:]
            mine = [bound for at, bound in exits if at >= first]
            exits = [test for test in exits if test[0] < first]
            open_loops += not mine
            loops.append((first, here, float(mine[-1]) if mine else 1.0))
    outermost = [i for i, loop in enumerate(loops) if not any(o[0] <= loop[0] and loop[1] < o[1] for o in loops)]
    for i, (first, last, trips) in enumerate(loops):
        windowed = i in outermost and stages and trips > 1
        if windowed and steps is not None and 0 <= trips - steps <= 4 * max(stages) + 4:
            trips = float(max(steps, 1))
        elif windowed:
            trips = max(trips - max(stages), 1.0)
        for at in range(first, min(last + _DELAY_SLOTS + 1, len(weights))):
            weights[at] *= trips
    return Bundles(sum(weights), open_loops)


def hbm_bytes(program: Program, op: Op, home: Computation) -> float:
    """Bytes between the core and HBM in one execution: operands and results there, of slices only the part that is touched."""
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _in_hbm(op.shapes)
    if op.opcode == "dynamic-update-slice":
        return 2.0 * _in_hbm(home.ops[op.operands[1]].shapes)
    if op.opcode != "fusion":
        return float(_in_hbm(op.shapes) + _in_hbm(home.shapes_of(op)))
    called = program.computations[op.called[0]]
    parameters = {int(o.inside): o for o in called.ops.values() if o.opcode == "parameter"}
    read = sum(
        min(_read(program, called, parameters[i].name), _stored(home.ops[name].shapes))
        for i, name in enumerate(op.operands)
        if _in_hbm(home.ops[name].shapes)
    )
    roots = called.root.operands if called.root.opcode == "tuple" else (called.root.name,)
    # The root of a fusion does not always carry the memory space; the fusion's own result does.
    written = sum(_written(called, name) for name, shape in zip(roots, op.shapes, strict=False) if shape.space == 0)
    return float(read + written)


def _stored(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.stored_bytes for shape in shapes)


def _in_hbm(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.stored_bytes for shape in shapes if shape.space == 0)


def _read(program: Program, home: Computation, name: str) -> int:
    """Bytes that a computation reads of one of its values."""
    total = 0
    for user in home.ops.values():
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += _stored(user.shapes)
        elif user.opcode in ("bitcast", "reshape", "convert"):
            # In the width of what is read, not of what it becomes.
            total += _read(program, home, user.name) * home.ops[name].shapes[0].bits // max(user.shapes[0].bits, 1)
        elif user.opcode == "fusion":
            inner = program.computations[user.called[0]]
            for i, operand in enumerate(user.operands):
                if operand == name:
                    parameter = next(o for o in inner.ops.values() if o.opcode == "parameter" and int(o.inside) == i)
                    total += _read(program, inner, parameter.name)
        elif user.opcode in ("tuple", "custom-call") or kind_of(user) or _updates_in_place(user, name):
            continue  # passed on, or what an exchange beside the fusion reads
        else:
            total += _stored(home.ops[name].shapes)
    return total


def _updates_in_place(user: Op, name: str) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name


def _written(home: Computation, name: str) -> int:
    """Bytes that a fusion writes of one of its results."""
    op = home.ops[name]
    while op.opcode == "bitcast":
        op = home.ops[op.operands[0]]
    if op.opcode == "dynamic-update-slice":
        return _stored(home.ops[op.operands[1]].shapes)
    if op.opcode in ("parameter", "custom-call", "get-tuple-element") or kind_of(op):
        return 0
    return _stored(op.shapes)


def copied_bytes(op: Op) -> float:
    """HBM traffic of a copy between memories: what is moved, twice if both ends are in HBM."""
    ends = [shape for shape in op.shapes if shape.size > 1][:2]
    if len(ends) < 2:
        return 0.0
    return float(min(shape.stored_bytes for shape in ends) * sum(shape.space == 0 for shape in ends))
