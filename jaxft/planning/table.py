"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxft.files import JsonObject
from jaxft.machine.gpus import Gpu
from jaxft.planning.hlo import Collective
from jaxft.planning.hlo.llo import LloPrice
from jaxft.planning.measure import MEMORY_SHARE, Plan

_MIB, _GIB = 2**20, 2**30


def plan_text(plan: Plan, advice: list[str]) -> str:
    """The plan for a terminal."""
    parts = [_head(plan), _memory(plan), _traffic(plan), _time(plan)]
    if plan.llo is not None:
        parts.append(_dearest(plan.llo))
    if advice:
        parts.append("\n".join(["advice", *(f"  - {line}" for line in advice)]))
    return "\n\n".join(parts)


def _head(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    how = {
        "compiled": "the real train step, compiled ahead of time for these chips",
        "unread": "the real train step, compiled ahead of time for these chips",
        "analytic": "formulas only: nothing was compiled",
    }[plan.source]
    if plan.roofline is not None:
        how += ", kernels chosen without autotuning (no GPU to try them on)"
    took = "" if plan.compile_seconds is None else f" in {plan.compile_seconds:.0f} s"
    unread = plan.source == "unread"
    attention = [] if plan.attention is None else [f"attention: {plan.attention}"]
    return "\n".join(
        [
            f"plan for {plan.topology.text}: {plan.topology.chips} chips ({plan.topology.layout}), mesh {mesh}",
            f"{plan.rows} rows {_row(plan.sizes)} a step, {plan.rows / plan.topology.chips:g} rows per chip; "
            f"{plan.parameters / 1e6:,.1f} M parameters, {plan.split_percent:.1f} % of their bytes split",
            f"source: {how}{took}",
            *(["this jax cannot read the program: its memory is the compiler's, the rest formulas"] if unread else []),
            *attention,
        ]
    )


def _row(sizes: Mapping[str, int]) -> str:
    """What a row is."""
    if "height" in sizes:
        return f"of {sizes['height']}x{sizes['width']} pixels"
    parts = [
        f"{sizes[axis]} {what}"
        for axis, what in (("length", "tokens"), ("frames", "frames"), ("target", "tokens of targets"))
        if axis in sizes
    ]
    return f"x {' and '.join(parts)}"


_WORTH_A_ROW = 0.0005 * _GIB


def _memory(plan: Plan) -> str:
    """The parts of the total, one below the other; what formulas say of temporaries stands below it."""
    m, exact = plan.memory, plan.source != "analytic"
    parts: list[tuple[str, float, str]] = [("parameters", m.parameters, "exact"), ("optimizer", m.optimizer, "exact")]
    if m.average:
        parts.append(("average", m.average, "exact"))
    parts.append(("batch", m.batch, "exact"))
    formulas = [
        ("gradients", float(m.gradients), "by formula: all at once"),
        ("activations", m.activations, "by formula: kept for the backward pass"),
    ]
    if exact:
        parts.append(("temporaries", m.temporaries, "of the compiled program"))
    elif m.total == sum(size for _, size, _ in [*parts, *formulas]):
        parts += formulas
    else:  # the compiler refused the program, and gave its total alone
        parts.append(("temporaries", m.total - sum(size for _, size, _ in parts), "what the compiler needs besides"))
    if m.program:
        parts.append(("program", m.program, "its code"))
    other = m.total - sum(size for _, size, _ in parts)
    if abs(other) >= _WORTH_A_ROW:
        parts.append(("other", other, "padding of arrays, outputs; less what the program does not read"))
    verdict = "" if m.limit is None else f"of {m.limit / _GIB:.2f} GiB: {'fits' if m.fits else 'DOES NOT FIT'}"
    if m.limit is not None and isinstance(plan.topology.chip, Gpu):
        verdict += f" ({100 * m.limit / plan.topology.chip.hbm_bytes:.0f} % of the GPU: {MEMORY_SHARE})"
    parts.append(("total", m.total, verdict))
    if formulas[0] not in parts:
        # Not parts of the sum: a compiler frees some before it needs the rest.
        parts += [(f"({name})", size, f"temporaries {note}") for name, size, note in formulas]
    return _table(("memory per chip", "GiB", ""), [(name, f"{size / _GIB:.3f}", note) for name, size, note in parts])


def _traffic(plan: Plan) -> str:
    if plan.source != "compiled":
        return _textbook(plan)
    lines = [
        (
            one.kind,
            f"{one.count:g}",
            _chips(one),
            f"{one.bytes / _MIB:.1f}",
            f"{one.bytes_sent / _MIB:.1f}",
            _hidden(one),
        )
        for one in grouped(plan)
    ]
    wire = sum(one.count * one.wire_bytes for one in plan.collectives) / _MIB
    lines.append(("total", "", "", "", f"{wire:.1f}", f"textbook {plan.traffic.total / _MIB:.1f}"))
    return _table(("exchanges per step", "count", "chips", "MiB", "MiB sent per chip", "overlapped"), lines)


def _textbook(plan: Plan) -> str:
    """The exchanges that formulas give: what for, of which kind, over which axes of the mesh."""
    causes = {
        "weights_gathered": ("all-gather", ("fsdp",)),
        "gradients_scattered": ("reduce-scatter", ("fsdp",)),
        "gradients_reduced": ("all-reduce", ("slices", "data", "context")),
        "tensor_parallel": ("all-reduce", ("tensor",)),
        "context_ring": ("collective-permute", ("context",)),
    }
    lines = []
    for name, size in plan.traffic.__dict__.items():
        kind, axes = causes[name]
        # Where nothing but fsdp splits the batch: those few gradients that it does not split.
        used = [axis for axis in axes if axis in plan.mesh] or [axis for axis in ("fsdp",) if axis in plan.mesh]
        over = " x ".join(f"{axis} {plan.mesh[axis]}" for axis in used)
        if size:
            lines.append((name.replace("_", " "), kind, over, _mib(size)))
    if not lines:
        return "exchanges per step, by formula: none; every chip works for itself"
    lines.append(("total", "", "", _mib(plan.traffic.total)))
    return _table(("exchanges per step, by formula", "kind", "over", "MiB sent per chip"), lines)


def _mib(size: float) -> str:
    return f"{size / _MIB:.1f}" if size >= 0.05 * _MIB else f"{size / _MIB:.2g}"


@dataclass(frozen=True)
class Exchanges:
    """Exchanges of one kind and size of group, over all executions."""

    kind: str
    chips: int
    nodes: int
    """Nodes of GPUs that a group lies over; else 1."""
    overlapped: bool
    """Whether they are started and awaited in different places."""
    count: float = 0.0
    bytes: float = 0.0
    bytes_sent: float = 0.0
    """By one chip."""
    open_share: float | None = None
    """Share of their time that nothing hides; None where no time is known."""


def grouped(plan: Plan) -> list[Exchanges]:
    """The exchanges of a plan by kind, group, and whether something may hide them."""
    groups: dict[tuple[str, int, int, bool], list[Collective]] = {}
    for one in plan.collectives:
        groups.setdefault((one.kind, one.group, plan.topology.nodes(one.span), one.asynchronous), []).append(one)
    return [Exchanges(*key, *_sums(plan, ones)) for key, ones in sorted(groups.items())]


def _sums(plan: Plan, ones: list[Collective]) -> tuple[float, float, float, float | None]:
    share = None
    if plan.roofline is not None:
        share = sum(map(plan.open_seconds, ones)) / (sum(map(plan.seconds_of, ones)) or 1.0)
    sent = sum(one.count * one.wire_bytes for one in ones)
    return sum(one.count for one in ones), sum(one.count * one.bytes for one in ones), sent, share


def _chips(one: Exchanges) -> str:
    return str(one.chips) if one.nodes == 1 else f"{one.chips} of {one.nodes} nodes"


def _hidden(one: Exchanges) -> str:
    if not one.overlapped or one.open_share is None:
        return "yes" if one.overlapped else "no"
    return f"{100 * (1 - one.open_share):.0f} %"


def _time(plan: Plan) -> str:
    useful = plan.useful.total / plan.topology.chips
    rows = [
        ("useful FLOPs per chip", f"{useful / 1e12:.3f} T", "three forward passes, nothing computed again, no padding")
    ]
    if plan.matmul_flops is not None:
        rows.append(("compiled matmul FLOPs", f"{plan.matmul_flops / 1e12:.3f} T", "of the program"))
    chip, link = plan.topology.chip, plan.link_seconds
    if chip is not None and link is not None:
        ideal = useful / chip.flops
        rows.append(("at peak", f"{1e3 * ideal:.2f} ms", f"{chip.flops / 1e12:.0f} TFLOP/s"))
        rows.append(("exchanges", f"{1e3 * link:.2f} ms", "one after the other, nothing hidden"))
    for name, seconds, note in prices(plan):
        share = plan.mfu(seconds)
        at_most = "at most " if name == "roofline" else ""
        mfu = "" if share is None else f"MFU {at_most}{100 * share:.1f} %; "
        rows.append((f"step, {name}", f"{1e3 * plan.step_seconds(seconds):.2f} ms", f"{mfu}{note}"))
    if chip is not None and not prices(plan):
        rows.append(("step", "unknown", f"no compiler estimate; at 40 % MFU: {1e3 * useful / chip.flops / 0.4:.2f} ms"))
    return _table(("time per step", "", ""), rows)


def _dearest(price: LloPrice, shown: int = 12) -> str:
    """Where the time goes: kinds of operations, then groups of alike ones."""
    groups: dict[tuple[str, str, str], tuple[float, float]] = {}
    for op in price.ops:
        key = (op.kind, op.bound, op.where)
        times, cycles = groups.get(key, (0.0, 0.0))
        groups[key] = (times + op.times, cycles + op.total)
    rows = [(kind, "", f"{100 * cycles / price.cycles:.1f} %", "") for kind, cycles in price.by_kind.items()]
    dearest = sorted(groups.items(), key=lambda item: -item[1][1])[:shown]
    for (kind, bound, where), (times, cycles) in dearest:
        rows.append((f"  {kind}, {bound}", f"{times:g} x", f"{100 * cycles / price.cycles:.1f} %", where))
    return _table(("where llo's time goes", "", "share", "what"), rows)


def prices(plan: Plan) -> list[tuple[str, float, str]]:
    """(name, seconds of computation, what it is) of each price that the plan has."""
    found = []
    if plan.est_seconds is not None:
        found.append(("est", plan.est_seconds, "compiler estimate, per operation; too dear for element-wise ones"))
    if plan.llo is not None:
        found.append(("llo", plan.llo.seconds, "compiler estimate, from machine code: within 20 % on known programs"))
    if plan.roofline is not None:
        note = "no estimate: each operation at the peak of matrix units or memory, whichever takes longer"
        found.append(("roofline", plan.roofline.seconds, note))
    return found


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    last = len(head) - 1

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), *(line(row) for row in rows)])


def _shape(plan: Plan) -> JsonObject:
    shape = list(plan.topology.shape)
    if not isinstance(plan.topology.chip, Gpu):
        return {"torus": shape}
    return {"nodes": shape[0], "per_node": shape[1]}


def plan_json(plan: Plan, advice: list[str], versions: dict[str, str]) -> JsonObject:
    """The plan as plain data."""
    chip = plan.topology.chip
    return {
        "source": plan.source,
        "topology": {"name": plan.topology.text, "chips": plan.topology.chips} | _shape(plan),
        "mesh": plan.mesh,
        "rows": plan.rows,
        "length": plan.sizes.get("length"),
        "sizes": plan.sizes,
        "parameters": plan.parameters,
        "split_percent": plan.split_percent,
        "attention": plan.attention,
        "memory_bytes": dataclasses.asdict(plan.memory) | {"fits": plan.memory.fits},
        "exchanges": [dataclasses.asdict(one) for one in grouped(plan)],
        "textbook_bytes_sent": plan.traffic.__dict__,
        "useful_flops": plan.useful.total / plan.topology.chips,
        "matmul_flops": plan.matmul_flops,
        "seconds": {name: plan.step_seconds(seconds) for name, seconds, _ in prices(plan)},
        "exchange_seconds": plan.link_seconds,
        "mfu": {name: plan.mfu(seconds) for name, seconds, _ in prices(plan)},
        "chip": None if chip is None else dataclasses.asdict(chip),
        "compile_seconds": plan.compile_seconds,
        "advice": advice,
        "versions": versions,
    }
