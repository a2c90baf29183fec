"""The report of a finished run, as files and as text for the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from jaxft.files import write_atomic
from jaxft.reporting.cells import cells_of, fit
from jaxft.reporting.plots import (
    Series,
    chart,
    confusion_png,
    curves_png,
    in_ascii,
    lacking,
    plain_label,
    schedule_png,
    score_series,
    series_of,
    shows_blocks,
    smoothed,
)
from jaxft.reporting.records import to_json
from jaxft.reporting.reliability import reliability_png
from jaxft.reporting.scores import SHOWN, Known, headline
from jaxft.reporting.sources_text import sources_text
from jaxft.reporting.thresholds_text import HONEST, thresholds_text

__all__ = ["report_text", "schedule_png", "schedule_text", "seeds_text", "write_report", "write_seeds"]

_MOST_CONFUSION_CLASSES = 20
_MOST_TABLE_CLASSES = 50
_SHOWN_CONFUSIONS = 10


def write_report(
    out: Path,
    metrics: Mapping[str, object],
    labels: Sequence[str],
    log: Sequence[Mapping[str, float | str]],
    *,
    split: str = "eval",
) -> list[Path]:
    """Writes ``metrics.json``, ``confusion.png`` if the task has classes, ``reliability.png`` if its probabilities were
    looked at and, unless the log is empty, ``curves.png``; no PNG where
    :func:`jaxft.reporting.plots.lacking` says why.

    Args:
      metrics: what the task's ``score()`` returned.
      labels: label names in the order of class ids.
      log: the records of ``log.jsonl``.
      split: of any other than ``eval``, files are named for it: ``metrics_test.json``.

    Returns:
      The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    known, named = cast(Known, metrics), "" if split == "eval" else f"_{split}"
    written = [
        _write_json(out / f"metrics{named}.json", metrics),
    ]
    if lacking() is None:
        written += [
            confusion_png(out / f"confusion{named}.png", known["confusion"], labels) if "confusion" in known else None,
            _reliability(out / f"reliability{named}.png", known, metrics),
            curves_png(out / "curves.png", log),
        ]
    return [path for path in written if path is not None]


def _reliability(path: Path, known: Known, metrics: Mapping[str, object]) -> Path | None:
    if not known.get("calibration", {}).get("bins"):
        return None
    return reliability_png(path, known["calibration"]["bins"], cast("float | None", metrics.get("ece")))


def _write_json(path: Path, tree: Mapping[str, object]) -> Path:
    write_atomic(path, json.dumps(to_json(_nulls(tree)), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def _nulls(tree: object) -> object:
    """The same tree with None for each NaN, a score of nothing."""
    if isinstance(tree, Mapping):
        return {key: _nulls(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_nulls(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def _shown(score: float) -> str:
    return "n/a" if math.isnan(score) else f"{score:.4f}"


def report_text(
    metrics: Mapping[str, object],
    labels: Sequence[str],
    log: Sequence[Mapping[str, float | str]],
    width: int = 100,
    *,
    colour: bool | None = None,
    blocks: bool | None = None,
) -> str:
    """Scores, the table of classes and the confusion matrix if the task has classes, and the learning curves.

    Args:
      colour: colours in the curves. None: when standard output is a terminal and NO_COLOR is not set.
      blocks: curves of block characters; otherwise ASCII alone. None: when standard output can show them.
    """
    blocks = shows_blocks(sys.stdout) if blocks is None else blocks
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") if colour is None else colour
    known = cast(Known, metrics)
    scores = [f"{shown} {_shown(value)}" for _, shown, value in headline(metrics)]
    rows = [f"rows {known['rows']:,}"] if "rows" in known else []
    head = _joined([*scores, *rows], min(width, 100))
    names = [plain_label(label) for label in labels]
    parts = [head]
    parts += [
        line
        for line in (
            _intervals_text(known, metrics, min(width, 100)),
            _threshold_text(known),
            _temperature_text(known),
            _no_score_text(metrics),
        )
        if line
    ]
    if "classes" in known:
        table = known["classes"]
        parts.append(_class_table(list(table.values()), [plain_label(name) for name in table], width))
    if len(known.get("sources", {})) > 1:
        parts.append(sources_text(known["sources"], width))
    if "thresholds" in known and "positive" not in known:  # that of the second of two classes is said in one line
        parts.append(thresholds_text(known["thresholds"], width, fit))
    if "confusion" in known:
        parts.append(_confusion_text(known["confusion"], names, width))
    parts += _curves(log, width, wanted, blocks)
    text = "\n\n".join(part for part in parts if part)
    return text if blocks else in_ascii(text)


def _joined(items: Sequence[str], width: int) -> str:
    """Items three blanks apart, on as many lines as they need."""
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + 3 + len(item) > width:
            lines.append("")
        lines[-1] += f"   {item}" if lines[-1] else item
    return "\n".join(lines)


def _threshold_text(metrics: Known) -> str:
    best = metrics.get("best_threshold")
    if not best:
        return ""
    name, tuned = plain_label(metrics["positive"]), metrics.get("thresholds")
    line = f"Best F1 of {name}: {best['f1']:.4f}, if probabilities of at least {best['threshold']:.8g} count"
    if tuned is None:
        return f"{line} (--threshold)."
    (row,) = tuned["labels"].values()
    return f"{line}; {row['f1_at_half']:.4f} at 0.5.\nThe threshold is {HONEST} (--threshold best)."


def _intervals_text(known: Known, metrics: Mapping[str, object], width: int) -> str:
    found, shown = known.get("intervals", {}), dict(SHOWN)
    parts = [f"{shown[name]} {low:.4f}..{high:.4f}" for name, (low, high) in found.items() if name in metrics]
    return _joined(["95 % of 1,000 resamples of the rows:", *parts], width) if parts else ""


def _temperature_text(metrics: Known) -> str:
    found = metrics.get("calibration", {})
    if found.get("temperature") is None:
        return ""
    errors = [value for name, value in found.items() if name.endswith("ece_at_temperature")]
    return f"Logits divided by {found['temperature']:.3g} would have a calibration error of {errors[0]:.4f}; nothing is divided."


def _no_score_text(metrics: Mapping[str, object]) -> str:
    """Why a headline says n/a."""
    missing = [shown for _, shown, value in headline(metrics) if math.isnan(value)]
    if not missing:
        return ""
    if not math.isnan(cast(float, metrics["loss"])):
        return f"No {', '.join(missing)}: all rows are of one class."
    return "Scores that are n/a are NaN: of nothing that could be predicted, or of a model that gives no numbers."


def _class_table(rows: Sequence[Mapping[str, float]], names: Sequence[str], width: int) -> str:
    first = min(max(map(cells_of, ("class", *names))), max(width - 41, 8))
    order = range(len(names))
    remark = ""
    if len(names) > _MOST_TABLE_CLASSES:
        order = sorted(order, key=lambda i: (rows[i]["f1"], -rows[i]["rows"]))[:_MOST_CONFUSION_CLASSES]
        remark = f"\nThe {len(order)} classes with the lowest F1 of {len(names)}, those of most rows first; all are in metrics.json."
    lines = [f"{fit('class', first)}  precision    recall        F1      rows"]
    for i in order:
        row = rows[i]
        scores = "".join(f"{row[name]:>10.4f}" for name in ("precision", "recall", "f1"))
        lines.append(f"{fit(names[i], first)} {scores}{row['rows']:>10,}")
    return "\n".join(lines) + remark


def _confusion_text(confusion: Sequence[Sequence[int]], names: Sequence[str], width: int) -> str:
    if len(names) > _MOST_CONFUSION_CLASSES:
        return _confusion_list(confusion, names, width)
    table = _confusion_table(confusion, names, width)
    return table or f"{_confusion_list(confusion, names, width)}\nThe whole matrix is wider than {width} columns."


def _confusion_table(confusion: Sequence[Sequence[int]], names: Sequence[str], width: int) -> str:
    """The matrix as a table; empty if the counts do not fit ``width``.

    Columns too narrow for names that can be told apart carry class numbers, and then the rows carry both.
    """
    count, digits = len(names), max(len(str(cell)) for row in confusion for cell in row)
    longest = max(map(cells_of, names))
    narrow = max(digits, len(str(count - 1)) + 1) + 2
    column = min((width - min(longest, 18)) // count, max(longest, digits) + 2)
    heads = [fit(name, max(column - 2, 1)) for name in names]
    rows = list(names)
    readable = column >= narrow and (column - 2 >= min(longest, 6)) and len(set(heads)) == count
    if not readable:
        column = narrow - 1
        heads = [f"#{i}" for i in range(count)]
        rows = [f"#{i} {name}" for i, name in enumerate(names)]
    room = width - count * column
    first = min(max(map(cells_of, rows)), room)
    if first < min(8, longest):
        return ""
    lines = ["true \\ predicted" if first >= 16 else "Rows: true. Columns: predicted."]
    header = "".join(fit(head.strip(), column, ">") for head in heads)
    if first >= 16:
        lines = [fit(lines[0], first) + header]
    else:
        lines.append(" " * first + header)
    for name, row in zip(rows, confusion, strict=True):
        lines.append(fit(name, first) + "".join(f"{cell:>{column}}" for cell in row))
    return "\n".join(lines)


def _confusion_list(confusion: Sequence[Sequence[int]], names: Sequence[str], width: int) -> str:
    wrong = [(-cell, i, j) for i, row in enumerate(confusion) for j, cell in enumerate(row) if i != j and cell]
    if not wrong:
        return "No row was taken for another class."
    shown = sorted(wrong)[:_SHOWN_CONFUSIONS]
    room = max((width - 40) // 2, 8)
    first, second = (min(max(cells_of(names[entry[k]]) for entry in shown), room) for k in (1, 2))
    lines = [f"Most frequent confusions ({len(shown)} of {len(wrong)} pairs of classes):"]
    for negative, i, j in shown:
        share = 100 * -negative / sum(confusion[i])
        lines.append(f"{-negative:>8,}  {fit(names[i], first)}  taken for  {fit(names[j], second)} {share:>6.1f}%")
    lines[0] += " rows, true, predicted, share of the true class"
    return "\n".join(lines)


def _curves(log: Sequence[Mapping[str, float | str]], width: int, colour: bool, blocks: bool) -> list[str]:
    train = series_of(log, "train", "loss")
    evaluated = series_of(log, "eval", "loss")._replace(name="eval")
    charts = [
        chart(
            "loss", [smoothed(train)._replace(name="train, smoothed")], [evaluated], width, colour=colour, blocks=blocks
        ),
        chart("eval", [], score_series(log), width, colour=colour, blocks=blocks),
    ]
    return list(dict.fromkeys(charts))  # one note will do where none can be drawn


def _seed_values(results: Mapping[int, Mapping[str, object]]) -> dict[str, list[float]]:
    """The scalar scores of each seed, by name; whole numbers (rows) are counts, not scores.

    Raises:
      ValueError: no seed, or the seeds were not scored alike.
    """
    scores = [
        {name: value for name, value in metrics.items() if isinstance(value, float)} for metrics in results.values()
    ]
    if not scores or any(entry.keys() != scores[0].keys() for entry in scores):
        raise ValueError(f"seeds {list(results)} do not have the same metrics")
    return {name: [entry[name] for entry in scores] for name in scores[0]}


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); one value has none."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def seeds_text(results: Mapping[int, Mapping[str, object]]) -> str:
    """Mean +- sd of every scalar metric over the seeds, and each seed's values.

    Args:
      results: the metrics of each seed.
    """
    values = _seed_values(results)
    first = max(map(len, ("metric", *values)))
    lines = [f"{'metric':<{first}}  {'mean +- sd':>18}" + "".join(f"{f'seed {seed}':>12}" for seed in results)]
    for name, column in values.items():
        mean, sd = mean_sd(column)
        spread = f"{mean:.4f} +- " + ("n/a" if sd is None else f"{sd:.4f}")
        lines.append(f"{name:<{first}}  {spread:>18}" + "".join(f"{value:>12.4f}" for value in column))
    return "\n".join([*lines, f"sd: sample standard deviation over {len(results)} seeds (n - 1)"])


def write_seeds(out: Path, results: Mapping[int, Mapping[str, object]], *, split: str = "eval") -> Path:
    """Writes ``seeds.json`` (of a test ``seeds_test.json``): mean, sd (null for one seed) and values of every scalar metric."""
    out.mkdir(parents=True, exist_ok=True)
    table = {}
    for name, column in _seed_values(results).items():
        mean, sd = mean_sd(column)
        table[name] = {"mean": mean, "sd": sd, "values": column}
    named = "" if split == "eval" else f"_{split}"
    return _write_json(out / f"seeds{named}.json", {"seeds": list(results), "metrics": table})


def schedule_text(rates: Sequence[float], width: int = 100, *, colour: bool = False) -> str:
    """The learning rate of every step, drawn as text, with its peak and last value."""
    if not len(rates):
        raise ValueError("a schedule of no steps cannot be drawn")
    values = [float(rate) for rate in rates]
    peak = max(range(len(values)), key=values.__getitem__)
    curve = Series("learning rate", range(len(values)), values)
    drawn = chart("", [curve], [], width, colour=colour, blocks=shows_blocks(sys.stdout))
    summary = f"{len(values)} steps; peak {values[peak]:.2e} at step {peak}; last {values[-1]:.2e}"
    return f"{drawn}\n{summary}"
