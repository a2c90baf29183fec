"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jaxft.hlo import Collective
from jaxft.hlo.llo import LloPrice
from jaxft.plan.measure import Plan

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
    torus = "x".join(map(str, plan.topology.shape))
    how = {
        "compiled": "the real train step, compiled ahead of time for these chips",
        "analytic": "formulas only: nothing was compiled",
    }[plan.source]
    took = "" if plan.compile_seconds is None else f" in {plan.compile_seconds:.0f} s"
    attention = [] if plan.attention is None else [f"attention: {plan.attention}"]
    return "\n".join(
        [
            f"plan for {plan.topology.text}: {plan.topology.chips} chips ({torus}), mesh {mesh}",
            f"{plan.rows} rows x {plan.length} tokens a step, {plan.rows / plan.topology.chips:g} rows per chip; "
            f"{plan.parameters / 1e6:,.1f} M parameters, {plan.split_percent:.1f} % of their bytes split",
            f"source: {how}{took}",
            *attention,
        ]
    )


def _memory(plan: Plan) -> str:
    m, exact = plan.memory, plan.source == "compiled"
    rows: list[tuple[str, float, str]] = [("parameters", m.parameters, "exact"), ("optimizer", m.optimizer, "exact")]
    if m.average:
        rows.append(("average", m.average, "exact"))
    rows.append(("batch", m.batch, "exact"))
    rows.append(
        ("temporaries", m.temporaries, "of the compiled program, among them" if exact else "estimate, of these")
    )
    rows.append(("  gradients", m.gradients, "estimate: all at once"))
    rows.append(("  activations", m.activations, "estimate: kept for the backward pass"))
    if m.program:
        rows.append(("program", m.program, "its code"))
    verdict = "" if m.limit is None else f"of {m.limit / _GIB:.2f} GiB: {'fits' if m.fits else 'DOES NOT FIT'}"
    rows.append(("total", m.total, verdict))
    return _table(("memory per chip", "GiB", ""), [(name, f"{size / _GIB:.3f}", note) for name, size, note in rows])


def _traffic(plan: Plan) -> str:
    if plan.source == "analytic":
        rows = [
            (name.replace("_", " "), f"{size / _MIB:.1f}", "formula") for name, size in plan.traffic.__dict__.items()
        ]
        return _table(("sent per chip and step", "MiB", ""), [row for row in rows if row[1] != "0.0"])
    lines = [
        (kind, f"{count:g}", str(group), f"{size / _MIB:.1f}", f"{wire / _MIB:.1f}", "yes" if hidden else "no")
        for (kind, group, hidden), (count, size, wire) in sorted(grouped(plan.collectives).items())
    ]
    wire = sum(one.count * one.wire_bytes for one in plan.collectives) / _MIB
    lines.append(("total", "", "", "", f"{wire:.1f}", f"textbook {plan.traffic.total / _MIB:.1f}"))
    return _table(("exchanges per step", "count", "chips", "MiB", "MiB sent per chip", "overlapped"), lines)


def grouped(collectives: Iterable[Collective]) -> dict[tuple[str, int, bool], tuple[float, float, float]]:
    """(count, bytes, bytes on the wire) of exchanges by kind, size of group, and whether something hides them."""
    found: dict[tuple[str, int, bool], tuple[float, float, float]] = {}
    for one in collectives:
        key = (one.kind, one.group, one.asynchronous)
        count, size, wire = found.get(key, (0.0, 0.0, 0.0))
        found[key] = (count + one.count, size + one.count * one.bytes, wire + one.count * one.wire_bytes)
    return found


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
        mfu = "" if share is None else f"MFU {100 * share:.1f} %; "
        rows.append((f"step, {name}", f"{1e3 * plan.step_seconds(seconds):.2f} ms", f"{mfu}{note}"))
    if chip is not None and plan.est_seconds is None and plan.llo is None:
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


def plan_json(plan: Plan, advice: list[str], versions: dict[str, str]) -> dict[str, Any]:
    """The plan as plain data."""
    chip = plan.topology.chip
    return {
        "source": plan.source,
        "topology": {"name": plan.topology.text, "chips": plan.topology.chips, "torus": list(plan.topology.shape)},
        "mesh": plan.mesh,
        "rows": plan.rows,
        "length": plan.length,
        "parameters": plan.parameters,
        "split_percent": plan.split_percent,
        "attention": plan.attention,
        "memory_bytes": dataclasses.asdict(plan.memory) | {"fits": plan.memory.fits},
        "exchanges": [
            {"kind": kind, "chips": group, "overlapped": hidden, "count": count, "bytes": size, "bytes_sent": wire}
            for (kind, group, hidden), (count, size, wire) in sorted(grouped(plan.collectives).items())
        ],
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
