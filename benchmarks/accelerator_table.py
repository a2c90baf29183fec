"""The table of benchmarks/accelerator.py: what was found, beside the goals.  python benchmarks/accelerator_table.py results.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GOALS = {
    "ratio": 1.0,  # times torch.compile's speed
    "mfu": 0.50,  # BERT-large, 512 tokens
    "memory": 0.10,  # of the plan's total, from the program's
}


def text_of(results: dict[str, Any]) -> str:
    """All sections that have something to say."""
    stages = results["stages"]
    parts = [_states(stages), _values(stages.get("values", {})), _families(stages.get("families", {}))]
    parts.append(_attention(stages.get("attention", {})))
    parts += [_steps(stages), _plans(stages), _resume(stages.get("resume", {}))]
    if results["rehearsal"]:
        parts.insert(0, "A REHEARSAL on a CPU at small sizes: no figure below says anything about speed.")
    return "\n\n".join(part for part in parts if part)


def _states(stages: dict[str, Any]) -> str:
    wrong = {name: stage for name, stage in stages.items() if stage["state"] != "ok"}
    lines = [f"stages: {len(stages) - len(wrong)} of {len(stages)} ok"]
    for name, stage in wrong.items():
        last = " | ".join(stage.get("last", []))
        lines.append(f"  {name}: {stage['state']}{': ' + last[:300] if last else ''}")
    return "\n".join(lines)


def _values(stage: dict[str, Any]) -> str:
    found = stage.get("found")
    if not found:
        return ""
    bounds, most, wrong = found["bounds"], {}, []
    for row in found["rows"]:
        ask = row["ask"]
        where = f"{ask['name']} ({ask['operands']}, {ask['length']})"
        for name, errors in row["errors"].items():
            key = (name, ask["operands"])
            worst = max(errors, key=lambda part: errors[part])
            most[key] = max(most.get(key, 0.0), errors[worst])
            if errors[worst] > bounds[ask["operands"]]:
                wrong.append(f"  WRONG  {name}: {where}: {worst} off by {errors[worst]:.1e}")
        wrong += [f"  FAILED {name}: {where}: {why}" for name, why in row["failed"].items()]
    backends = list(dict.fromkeys(name for name, _ in most))
    lines = [f"attention values and gradients against reference: {len(found['rows'])} requests on {found['device']}"]
    lines.append(f"{'largest relative error':26}" + "".join(f"{kind:>12}" for kind in bounds))
    for name in backends:
        cells = (f"{most[name, kind]:12.1e}" if (name, kind) in most else f"{'refuses':>12}" for kind in bounds)
        lines.append(f"{name:26}" + "".join(cells))
    lines.append(f"{'goal, at most':26}" + "".join(f"{bound:12.0e}" for bound in bounds.values()))
    return "\n".join(lines + wrong)


def _families(stage: dict[str, Any]) -> str:
    found = stage.get("found")
    if not found:
        return ""
    lines = [f"families, every head, float32 against the CPU: {len(found['rows'])} heads on {found['device']}"]
    for name in dict.fromkeys(sorted(row["family"] for row in found["rows"])):
        rows = [row for row in found["rows"] if row["family"] == name]
        done = [row for row in rows if "failed" not in row]
        most = (f"{part} {max((row[part] for row in done), default=0.0):.1e}" for part in ("values", "gradients"))
        lines.append(f"{name:26}{len(done)} of {len(rows)} heads, at most {', '.join(most)}")
        for row in rows:
            who = f"{name} {row['head'] or 'encoder'}"
            if "failed" in row:
                lines.append(f"  FAILED {who}: {row['failed']}")
            elif max(row["values"], row["gradients"]) > found["bound"]:
                lines.append(f"  WRONG  {who}: values {row['values']:.1e}, gradients {row['gradients']:.1e}")
    return "\n".join([*lines, f"goal, at most              {found['bound']:.0e}"])


def _attention(stage: dict[str, Any]) -> str:
    rows = stage.get("found", {}).get("rows", [])
    if not rows:
        return ""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = ["attention, bf16: ms of both passes (and of the forward pass)"]
    lines.append(f"{'tokens':26}" + "".join(f"{length:>18}" for length in lengths))
    for name in names:
        cells = []
        for length in lengths:
            row = next((r for r in rows if r["length"] == length and r["contender"] == name), {})
            cells.append(f"{row['ms']['both']:.3f} ({row['ms']['forward']:.3f})" if "ms" in row else "-")
        lines.append(f"{name:26}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _steps(stages: dict[str, Any]) -> str:
    lines = []
    for name, stage in stages.items():
        rows = stage.get("found", {}).get("rows", []) if name.startswith("step-") else []
        compiled = next((row for row in rows if row["kind"] == "torch-bf16-compile" and "ms" in row), None)
        for row in rows:
            what = f"{row['size']} {row['rows']}x{row['length']}" + (
                f" dropout {row['dropout']}" if row["dropout"] else ""
            )
            if "error" in row:
                lines.append(f"{what:26}{row['kind']:22}{row['error'][:80]}")
                continue
            ratio = f"{compiled['ms'][0] / row['ms'][0]:.2f}" if compiled else ""
            mfu = f"{100 * row['mfu']:.1f} %" if "mfu" in row else ""
            lines.append(
                f"{what:26}{row['kind']:22}{row['ms'][0]:9.1f}{row['tokens_per_second']:12,.0f}{mfu:>9}{row['mib']:10,.0f}"
                f"{ratio:>17}"
            )
    if not lines:
        return ""
    head = f"{'a train step':26}{'':22}{'ms':>9}{'tokens/s':>12}{'MFU':>9}{'peak MiB':>10}{'x torch.compile':>17}"
    goal = f"goals: jaxft at {GOALS['ratio']:.1f} x torch.compile or more; MFU of large at 512 tokens {100 * GOALS['mfu']:.0f} %"
    return "\n".join([head, *lines, goal])


def _plans(stages: dict[str, Any]) -> str:
    lines = []
    for name, stage in stages.items():
        if not name.startswith("plan-"):
            continue
        plan = stage.get("found")
        rows = stages.get(name.replace("plan", "step", 1), {}).get("found", {}).get("rows", [])
        ours = next((row for row in rows if row["kind"].startswith("jaxft") and "ms" in row), None)
        if not plan or ours is None:
            continue
        planned, real = plan["memory_bytes"]["total"], ours["program_bytes"]
        seconds = ", ".join(f"{kind} {1e3 * value:.1f}" for kind, value in plan["seconds"].items())
        lines.append(
            f"{name[5:]:20}{plan['topology']['name']:>9}{planned / 2**20:12,.0f}{real / 2**20:12,.0f}"
            f"{100 * (planned / real - 1):+9.1f} %{ours['mib']:12,.0f}{ours['ms'][0]:10.1f}  {seconds}"
        )
    if not lines:
        return ""
    head = f"{'plan':20}{'for':>9}{'plan MiB':>12}{'program':>12}{'plan off':>11}{'peak MiB':>12}{'step ms':>10}  plan's ms"
    return "\n".join([head, *lines, f"goal: the plan's memory within {100 * GOALS['memory']:.0f} % of the program's"])


def _resume(stage: dict[str, Any]) -> str:
    found = stage.get("found")
    if not found or "equal" not in found:
        return ""
    same = "equal byte for byte" if found["equal"] else f"NOT equal, numbers differ by up to {found['difference']:.1e}"
    return (
        f"a run of {found['steps']} steps stopped by SIGTERM (exit {found['stopped']['exit']}, {found['stopped']['lines']} lines) "
        f"and resumed (exit {found['resumed']['exit']}): log.jsonl {same}; accuracy {found['accuracy']:.4f}, "
        f"{found['tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    print(text_of(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
