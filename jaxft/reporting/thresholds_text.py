"""Tuned thresholds as text: from which probability on each label had the highest F1, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxft.files import JsonObject
from jaxft.reporting.plots import plain_label

_MOST = 50
_SHOWN = 20
HONEST = "tuned on these very rows: other rows will score less"


def thresholds_text(found: JsonObject, width: int, fit: Callable[[str, int], str]) -> str:
    """A table of labels; of very many, those that gain most.

    Args:
      found: ``labels``, each with ``threshold`` (None: no row could tune it), ``f1`` and ``f1_at_half``; their means ``macro_...``.
      width: columns of the terminal.
      fit: cuts or pads a text to a number of columns.
    """
    table: Mapping[str, JsonObject] = found["labels"]
    names, remark = list(table), ""
    if len(names) > _MOST:
        names = sorted(names, key=lambda name: table[name]["f1_at_half"] - table[name]["f1"])[:_SHOWN]
        remark = f"\nThe {len(names)} labels of {len(table)} that gain most; all are in metrics.json."
    first = min(max(len("label"), *(len(plain_label(name)) for name in names)), max(width - 41, 8))
    lines = [
        f"Thresholds of the highest F1, {HONEST} (--threshold best).",
        f"Macro F1 {found['macro_f1']:.4f} at them, {found['macro_f1_at_half']:.4f} at 0.5.",
        "",
        f"{fit('label', first)}  threshold  F1 at 0.5   F1 at it      rows",
    ]
    for name in names:
        row = table[name]
        cut = "none" if row["threshold"] is None else f"{row['threshold']:.8g}"
        lines.append(
            f"{fit(plain_label(name), first)} {cut:>10} {row['f1_at_half']:>10.4f} {row['f1']:>10.4f}{row['rows']:>10,}"
        )
    return "\n".join(lines) + remark
