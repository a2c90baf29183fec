"""The picture of whether a model's probabilities mean what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxft.reporting import plots


def reliability_png(path: Path, bins: Sequence[Mapping[str, float]], error: float | None) -> Path:
    """How often what was said with some probability came true, over that probability; below, how many rows said so.

    Args:
      bins: each ``from`` one probability ``to`` another, the means ``said`` and ``came``, and its ``rows``.
      error: expected calibration error, for the title.
    """
    figure = plots.new_figure(5.0, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1.0])
    edges, widths = [one["from"] for one in bins], [one["to"] - one["from"] for one in bins]
    plots.style(above, "share that came true")
    above.bar(edges, [one["came"] for one in bins], widths, align="edge", color=plots.BLUE, alpha=0.3, lw=0)
    above.plot([0, 1], [0, 1], "--", color=plots.GRAY, lw=1.0, label="as it should be")
    above.plot([one["said"] for one in bins], [one["came"] for one in bins], "o-", ms=3.5, lw=1.4, color=plots.BLUE)
    above.set_ylim(0, 1)
    above.legend(frameon=False, fontsize=9)
    plots.style(below, "share of rows")
    total = sum(one["rows"] for one in bins)
    below.bar(edges, [one["rows"] / total for one in bins], widths, align="edge", color=plots.GRAY, alpha=0.6, lw=0)
    below.set_xlim(0, 1)
    below.set_xlabel("probability")
    said = "" if error is None else f", calibration error {error:.4f}"
    figure.suptitle(f"Reliability, {int(total):,} probabilities{said}", fontsize=11)
    return plots.save(figure, path)
