"""Results of the attention benchmark as text, CSV, JSON and a plot, and against an earlier run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxft.bench.attention import PASSES, Result, from_json, to_json
from jaxft.errors import UserError
from jaxft.files import write_atomic
from jaxft.reporting.plots import lacking

ANCHOR = "torch-sdpa"
_HEAD = ("contender", "pass", "ms", "min", "max", "GFLOP/s", "of peak", "MiB", "compile s")


def text_of(results: Sequence[Result], before: dict[str, Result] | None = None) -> str:
    """A table per shape: each contender's passes with their ratio to torch's and, if given, to an earlier run's times."""
    shapes: dict[str, list[Result]] = {}
    for result in results:
        shapes.setdefault(shape_of(result), []).append(result)
    return "\n\n".join(_table(name, group, before) for name, group in shapes.items())


def shape_of(result: Result) -> str:
    """What is the same for all contenders of a table."""
    c = result.case
    heads = f"{c.heads}" if c.heads == c.key_heads else f"{c.heads}/{c.key_heads}"
    parts = [f"{c.rows} x {heads} heads x {c.length} tokens x {c.size}, {c.operands}"]
    parts += [c.hidden] if c.hidden != "none" else []
    parts += ["causal"] if c.causal else []
    parts += [f"dropout {c.dropout:g} ({c.bits})"] if c.dropout else []
    return ", ".join(parts)


def _table(name: str, group: Sequence[Result], before: dict[str, Result] | None) -> str:
    anchor = next((r for r in group if r.case.backend == ANCHOR), None)
    if anchor is not None and any(r.platform != anchor.platform for r in group):
        anchor = None  # torch runs on the CPU here: no measure for an accelerator
    head = [*_HEAD, *(["/ torch"] if anchor else []), *(["/ before"] if before else [])]
    rows = []
    for passes in PASSES:
        for result in group:
            timing = getattr(result, passes)
            flops = result.flops(passes)
            row = [_label(result), passes, *(f"{x:.2f}" for x in (timing.median, timing.least, timing.most))]
            row += [f"{flops / 1e9:.0f}", f"{100 * flops / result.matmul_peak:.0f} %"]
            row += ["?" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"]
            row += [f"{result.compile_seconds:.1f}"]
            if anchor:
                row += [f"{timing.median / getattr(anchor, passes).median:.2f}"]
            if before:
                old = before.get(result.case.key)
                row += ["new" if old is None else f"{timing.median / getattr(old, passes).median:.2f}"]
            rows.append(row)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([name, line(head), *map(line, rows)])


def _label(result: Result) -> str:
    asked = result.case.backend
    return asked if asked == result.backend else f"{asked} ({result.backend})"


def write_results(folder: Path, about: Mapping[str, object], results: Sequence[Result]) -> list[Path]:
    """``attention.json``, ``attention.csv`` and ``attention.png`` (time and memory against length, where there
    are several and :func:`jaxft.reporting.plots.lacking` has nothing against it)."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / "attention.json", folder / "attention.csv"]
    tree = {"machine": about, "results": [to_json(r) for r in results]}
    write_atomic(made[0], json.dumps(tree, indent=1) + "\n")
    write_atomic(made[1], csv_of(results))
    if len({r.case.length for r in results}) > 1 and lacking() is None:
        made.append(_plot(folder / "attention.png", about, results))
    return made


def csv_of(results: Sequence[Result]) -> str:
    """One line per case and pass."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = [name for name in to_json(results[0])["case"] if name != "backend"] if results else []
    numbers = ("median_ms", "min_ms", "max_ms", "flops", "peak_share", "peak_bytes", "compile_seconds")
    writer.writerow(["contender", "ran", *fields, "pass", *numbers])
    for result in results:
        case = to_json(result)["case"]
        for passes in PASSES:
            timing, flops = getattr(result, passes), result.flops(passes)
            shown = [f"{x:.4f}" for x in (timing.median, timing.least, timing.most)]
            shown += [f"{flops:.4g}", f"{flops / result.matmul_peak:.4f}"]
            shown += ["" if result.peak_bytes is None else str(result.peak_bytes), f"{result.compile_seconds:.2f}"]
            writer.writerow([case["backend"], result.backend, *(case[name] for name in fields), passes, *shown])
    return out.getvalue()


def read_results(path: Path) -> dict[str, Result]:
    """Reads the results of an earlier run, by :attr:`Case.key`.

    Raises:
      UserError: the file is not one of ours.
    """
    try:
        results = [from_json(tree) for tree in json.loads(path.read_text())["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--against {path}: not a result of jaxft bench attention ({type(error).__name__}: {error})"
        ) from error
    return {result.case.key: result for result in results}


def _plot(path: Path, about: Mapping[str, object], results: Sequence[Result]) -> Path:
    from jaxft.reporting.plots import curves_by_name_png

    def milliseconds(passes: str) -> Callable[[Result], float | None]:
        return lambda result: getattr(result, passes).median

    def mib(result: Result) -> float | None:
        return None if not result.peak_bytes or result.peak_bytes < 2**20 else result.peak_bytes / 2**20

    panels = {
        "forward, ms": milliseconds("forward"),
        "forward + backward, ms": milliseconds("both"),
        "memory, MiB": mib,
    }
    operands = {r.case.operands for r in results}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in panels}
    for title, value in panels.items():
        for result in sorted(results, key=lambda r: r.case.length):
            name = result.case.backend if len(operands) == 1 else f"{result.case.backend}, {result.case.operands}"
            found = value(result)
            if found is not None:
                curves[title].setdefault(name, []).append((result.case.length, found))
    first = shape_of(results[0]).replace(f" x {results[0].case.length} tokens", "")
    return curves_by_name_png(path, curves, "tokens", f"attention: {first}\n{about['cpu']}, {about['cores']} cores")
