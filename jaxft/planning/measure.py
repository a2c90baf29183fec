"""A plan: the real train step, compiled ahead of time for chips that need not be there, and what its program says."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.stages import Compiled, Lowered

from jaxft.attention import choices, described
from jaxft.errors import UserError
from jaxft.machine.chips import Topology, Tpu
from jaxft.machine.gpus import Gpu, target_config
from jaxft.machine.threads import Ahead
from jaxft.parallel.sharding import shard_bytes, whole_bytes
from jaxft.planning.hlo import Collective, costs_of
from jaxft.planning.hlo.llo import ChipSpeed, LloPrice, llo_cycles
from jaxft.planning.hlo.roofline import Peaks, Roofline, roofline_of
from jaxft.planning.textbook import Traffic, activation_bytes, traffic_of
from jaxft.training.flops import ModelFlops, model_flops
from jaxft.training.recipe import Recipe

Note = Callable[[str], None]


@dataclass(frozen=True)
class Memory:
    """Bytes per chip."""

    parameters: int
    optimizer: int
    average: int
    batch: int
    gradients: int
    """Estimate: those of all parameters at once."""
    activations: float
    """Estimate: what the backward pass keeps."""
    temporaries: float
    """Temporaries of the compiled program; where nothing was compiled, gradients and activations."""
    program: int
    total: float
    """At the peak."""
    limit: float | None
    """What the chip has for programs; None: unknown."""

    @property
    def fits(self) -> bool:
        """Whether the chip holds it."""
        return self.limit is None or self.total <= self.limit


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before it has hardware. Per chip and step, unless it says otherwise."""

    source: str
    """``compiled``; ``unread``, if it was compiled and this jax cannot read the program: memory is the compiler's then, all else formulas;
    or ``analytic``."""
    topology: Topology
    mesh: dict[str, int]
    rows: int
    """Rows per step over all chips."""
    length: int
    sizes: dict[str, int]
    """Sizes of a batch along its axes besides ``batch``: ``length`` of texts, ``height`` and ``width`` of images, ``frames`` of sounds."""
    parameters: int
    """How many, in all."""
    split_percent: float
    """Percentage of the parameters' bytes that some mesh axis splits."""
    memory: Memory
    collectives: tuple[Collective, ...]
    traffic: Traffic
    """By the textbook."""
    useful: ModelFlops
    matmul_flops: float | None
    """FLOPs of the compiled matrix products, with what is computed again."""
    est_seconds: float | None
    llo: LloPrice | None
    compile_seconds: float | None
    unpriced: tuple[str, ...] = ()
    attention: str | None = None
    """Which backends compute it, and why; None: nothing was traced."""
    roofline: Roofline | None = None
    """Roofline of a GPU program, whose compiler states no times."""

    @property
    def link_seconds(self) -> float | None:
        """Seconds of the exchanges one after the other, at the full bandwidth of the links that their groups can use."""
        if self.topology.chip is None:
            return None
        if self.source != "compiled":
            return self.traffic.total / self.topology.bandwidth(self.topology.chips)
        return sum(map(self.seconds_of, self.collectives))

    def seconds_of(self, one: Collective) -> float:
        """Seconds of an exchange's executions with nothing else on the links. Permutes go to a neighbour, over one axis; GPUs
        that send to all others do so over their own network card each."""
        alone = one.kind == "collective-permute" or (one.kind == "all-to-all" and isinstance(self.topology.chip, Gpu))
        return one.count * one.wire_bytes / self.topology.bandwidth(2 if alone else one.group, one.span)

    def open_seconds(self, one: Collective) -> float:
        """The part of :meth:`seconds_of` that no computation hides. Where a roofline says how long the operations between start
        and end take, they hide as much as that; else everything that is started and awaited in different places counts as
        hidden."""
        if not one.asynchronous:
            return self.seconds_of(one)
        if self.roofline is None or one.name not in self.roofline.beside:
            return 0.0
        return max(0.0, self.seconds_of(one) - one.count * self.roofline.beside[one.name])

    def step_seconds(self, compute: float) -> float:
        """With the exchanges that nothing hides."""
        if self.topology.chip is None:
            return compute
        return compute + sum(map(self.open_seconds, self.collectives))

    def mfu(self, compute: float) -> float | None:
        """Useful FLOPs over time and peak, if every token is real."""
        if self.topology.chip is None:
            return None
        return self.useful.total / self.topology.chips / self.step_seconds(compute) / self.topology.chip.flops


class DoesNotFit(Exception):
    """The compiler found that the program needs more memory than the chip has."""

    def __init__(self, used: float, limit: float) -> None:
        self.used, self.limit = used, limit
        super().__init__(f"{used} of {limit} bytes")


def make_plan(
    recipe: Recipe, topology: Topology, rows: int, length: int, *, compiled: bool, llo_folder: Path | None = None
) -> Plan:
    """The plan of one train step.

    Args:
      recipe: on a mesh of the topology's devices.
      rows, length: of the global batch.
      compiled: compile it; otherwise, formulas alone.
      llo_folder: where libtpu has been told to write machine code (:func:`jaxft.planning.hlo.llo.llo_flags`).
    """
    state = recipe.state
    bytes_of = {
        name: shard_bytes(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
        for name, tree in (
            ("parameters", state.params),
            ("optimizer", state.opt_state),
            ("average", () if state.ema is None else state.ema),
            ("batch", recipe.batch(recipe.shape(rows, length))),
        )
    }
    kept, gradients = activation_bytes(recipe, rows, length), bytes_of["parameters"]
    whole = whole_bytes(recipe.shapes, recipe.shardings)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(recipe.shapes))
    resident = sum(bytes_of.values())
    memory = Memory(
        **bytes_of,
        gradients=gradients,
        activations=kept,
        temporaries=gradients + kept,
        program=0,
        total=resident + gradients + kept,
        limit=usable_bytes(topology),
    )
    plan = Plan(
        source="analytic",
        topology=topology,
        mesh={axis: size for axis, size in recipe.mesh.shape.items() if size > 1},
        rows=rows,
        length=length,
        sizes=dict(recipe.shape(rows, length).sizes),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(recipe.shapes)),
        split_percent=100.0 * (1 - whole / total),
        memory=memory,
        collectives=(),
        traffic=traffic_of(recipe, rows, length),
        useful=model_flops(recipe, recipe.shape(rows, length)),
        matmul_flops=None,
        est_seconds=None,
        llo=None,
        compile_seconds=None,
    )
    return _compiled(plan, recipe, llo_folder) if compiled else plan


_TPU_SHARE = 15.75 / 16  # of a v5e's memory, by the compiler's own message
MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def usable_bytes(topology: Topology) -> float | None:
    """What a program may take of a chip's memory; None where that is not known. Of a GPU, jax takes 75 % when it starts, or
    what the environment says (https://docs.jax.dev/en/latest/gpu_memory_allocation.html).

    Raises:
      UserError: the environment says nonsense.
    """
    if topology.chip is None:
        return None
    if isinstance(topology.chip, Tpu):
        return topology.chip.hbm_bytes * _TPU_SHARE
    text = os.environ.get(MEMORY_SHARE, "0.75")
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"{MEMORY_SHARE}={text!r}: expected a share of a GPU's memory, above 0 and up to 1")
    return topology.chip.hbm_bytes * share


def _compiled(plan: Plan, recipe: Recipe, llo_folder: Path | None) -> Plan:
    start = time.perf_counter()
    with jax.set_mesh(recipe.mesh), choices() as seen:
        lowered = recipe.train_program().lower(
            recipe.state, recipe.batch(recipe.shape(plan.rows, plan.length)), recipe.seed()
        )
        program = _compile(lowered, resident=plan.memory.total - plan.memory.temporaries)
    seconds = time.perf_counter() - start
    memory, text = _memory_of(program, plan.memory), _text_of(program)
    if text is None:
        return replace(plan, source="unread", memory=memory, compile_seconds=seconds)
    costs, chip = costs_of(text), plan.topology.chip
    est = price = None
    if isinstance(chip, Tpu):
        est = costs.estimated_cycles / chip.clock_hz if costs.estimated_cycles else None
        if llo_folder is not None:
            price = llo_cycles(llo_folder, text, ChipSpeed(chip.clock_hz, chip.hbm_bandwidth, chip.flops))
    return replace(
        plan,
        source="compiled",
        attention=described(seen.values(), recipe.config.model.attention),
        memory=memory,
        collectives=costs.collectives,
        matmul_flops=costs.matmul_flops,
        est_seconds=est,
        llo=price,
        compile_seconds=seconds,
        unpriced=costs.unpriced,
        roofline=roofline_of(text, _peaks(chip)) if isinstance(chip, Gpu) else None,
    )


def _memory_of(program: Compiled, formulas: Memory) -> Memory:
    """What a compiled program takes of a chip."""
    stats = program.memory_analysis()
    assert stats is not None  # XLA's compilers give it
    extra = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return replace(
        formulas,
        temporaries=stats.temp_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
        total=stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes + extra,
    )


def _text_of(program: Compiled) -> str | None:
    """A program as text; None: this jaxlib cannot read what a newer libtpu has written (0.10 of some asynchronous exchanges)."""
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
        return None


def _peaks(gpu: Gpu) -> Peaks:
    return Peaks(gpu.flops, gpu.tf32_flops, gpu.float32_flops, gpu.hbm_bandwidth)


def _compile(lowered: Lowered, resident: float) -> Compiled:
    try:
        # In a thread, so that Ctrl-C need not wait for the compiler.
        return Ahead(lambda name: lowered.compile(), ["step"], 1).result("step")
    except jax.errors.JaxRuntimeError as error:
        # libtpu 0.0.52 tells the temporaries, earlier ones everything.
        found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        of_temporaries = re.search(
            r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", str(error)
        )
        used = found or of_temporaries
        if used is None:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        needed, limit = float(used[1]) * unit[used[2]], float(used[3]) * unit[used[4]]
        raise DoesNotFit(needed + (resident if found is None else 0.0), limit) from error


def devices_of(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, which need not be there.

    Raises:
      UserError: libtpu or jax's CUDA plug-in is missing, or does not know the topology.
    """
    if topology.chip is None:
        devices = jax.devices("cpu")
        if len(devices) < topology.chips:
            raise UserError(f"--topology {topology.text}: this process simulates {len(devices)} CPU devices")
        return devices[: topology.chips]
    return _gpus(topology, topology.chip) if isinstance(topology.chip, Gpu) else _tpus(topology, topology.chip)


def _tpus(topology: Topology, chip: Tpu) -> list[jax.Device]:
    from jax.experimental import topologies

    # Names of v4 count cores: one device per chip only with this.
    more = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        return list(topologies.get_topology_desc(topology.libtpu_name, "tpu", **more).devices)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology {topology.text}: libtpu does not give {topology.libtpu_name}: {reason}; pip install libtpu, or "
            "plan by formulas: --analytic"
        ) from error


def _gpus(topology: Topology, gpu: Gpu) -> list[jax.Device]:
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        raise UserError(
            f"--topology {topology.text}: jax's CUDA compiler is not installed: pip install "
            '"jax[cuda13]" (4.4 GB; no GPU needed), or plan by formulas: --analytic'
        )
    from jax.experimental import topologies

    nodes, each = topology.shape
    # Partitions, hosts of each, devices of each host. XLA takes for a partition what NVLink connects: a node.
    shape = f"{nodes}x1x{each}"
    try:
        described = topologies.get_topology_desc(platform="cuda", target_config=target_config(gpu), topology=shape)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology {topology.text}: jax's CUDA compiler does not give these GPUs: {reason}; pip install --upgrade "
            '"jax[cuda13]", or plan by formulas: --analytic'
        ) from error
    return list(described.devices)


_NEAR = 0.03  # of a larger batch that is not looked for any more: programs near the limit take long to compile


def largest_batch(plan_of: Callable[[int], Plan], start: int, unit: int, note: Note) -> Plan:
    """The plan of the largest batch, a multiple of ``unit`` rows, whose program fits; within 3 %.

    Memory grows in a straight line with the rows: two programs say where it ends, the next ones whether that is so.

    Raises:
      UserError: not even one row per device fits.
    """
    known: dict[int, float] = {}
    best: Plan | None = None
    rows = start
    for _ in range(12):
        try:
            plan = plan_of(rows)
            known[rows], limit = plan.memory.total, plan.memory.limit or float("inf")
        except DoesNotFit as error:
            plan, known[rows], limit = None, error.used, error.limit
        fits = plan is not None and plan.memory.fits
        note(f"{rows} rows: {known[rows] / 2**30:.2f} of {limit / 2**30:.2f} GiB {'fit' if fits else 'do not fit'}")
        if fits and plan is not None and (best is None or plan.rows > best.rows):
            best = plan
        rows = _next(known, limit, unit)
        if rows in known or (best is not None and rows < (1 + _NEAR) * best.rows and len(known) > 2):
            break
    if best is None:
        raise UserError(f"not even {unit} rows fit; see the advice of the plan without --fit")
    return best


def _next(known: dict[int, float], limit: float, unit: int) -> int:
    """The number of rows to try next: where a straight line through the fewest and the most rows meets the limit, but never
    more than twice the most that fit, and once a number has failed, at most half-way to it. (Near the limit compilers save
    memory: the line through two neighbours may point anywhere.)"""
    low = max((rows for rows, used in known.items() if used <= limit), default=0)
    high = min((rows for rows, used in known.items() if used > limit), default=None)
    if low == 0:
        return max(unit, min(known) // 2 // unit * unit)
    first, last = min(known), max(known)
    guess = 2 * low
    if first != last and known[last] > known[first]:
        slope = (known[last] - known[first]) / (last - first)
        guess = min(guess, int(low + (limit - known[low]) / slope))
    if high is not None:
        guess = min(guess, (low + high) // 2)
    return max(low, guess // unit * unit)
