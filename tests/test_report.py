"""The report: numbers in text tables, PNG files, seeds, schedules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.reporting import plots
from jaxft.reporting.plots import Series, score_series, smoothed
from jaxft.reporting.report import report_text, schedule_png, schedule_text, seeds_text, write_report, write_seeds
from jaxft.tasks.classification import Task

pytestmark = pytest.mark.usefixtures("painted")
LABELS = ("bad", "fair", "good")
# 20 rows; bad: precision 6/8, recall 6/10; fair: 4/7, 4/6; good: 3/5, 3/4.
CONFUSION = [[6, 3, 1], [1, 4, 1], [1, 0, 3]]


def metrics_of(confusion: list[list[int]], labels: tuple[str, ...] = LABELS) -> dict[str, Any]:
    matrix = np.asarray(confusion, np.float64)
    counts = {"true": matrix.sum(1), "predicted": matrix.sum(0), "correct": np.diag(matrix)}
    return Task(labels).score({"confusion": matrix, "loss": np.asarray(10.0), "weight": np.asarray(20.0), **counts})


def many(count: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A matrix with distinct off-diagonal counts i * count + j + 1."""
    labels = tuple(f"label number {i}" for i in range(count))
    return metrics_of([[i * count + j + 1 for j in range(count)] for i in range(count)], labels), labels


def log_of(steps: int = 200) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = math.nan if step == 7 else math.exp(-step / 50) + 0.1 * math.sin(step)
        log.append({"step": step, "kind": "train", "loss": loss, "learning_rate": 5e-5 * (1 - step / steps)})
        if step % 20 == 0:
            scores = {"accuracy": step / steps, "macro_f1": 0.9 * step / steps, "micro_f1": step / steps}
            log.append({"step": step, "kind": "eval", "loss": math.exp(-step / 50) + 0.2, "rows": 20, **scores})
    return log


def size_of(path: Path) -> tuple[int, int]:
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.std() > 0.01, f"{path} is blank"
    return pixels.shape[1], pixels.shape[0]


def test_text_holds_the_right_numbers() -> None:
    lines = report_text(metrics_of(CONFUSION), LABELS, []).splitlines()
    # macro: (2*6/18 + 2*4/13 + 2*3/9) / 3 = 0.6496; weighted: (10*2*6/18 + 6*2*4/13 + 4*2*3/9) / 20 = 0.6513
    # Matthews: (13 * 20 - 142) / sqrt(262 * 248) = 0.4629
    assert (
        lines[0]
        == "accuracy 0.6500   macro F1 0.6496   micro F1 0.6500   weighted F1 0.6513   MCC 0.4629   loss 0.5000"
    )
    assert lines[1] == "rows 20"
    table = [line.split() for line in lines]
    assert ["bad", "0.7500", "0.6000", "0.6667", "10"] in table
    assert ["fair", "0.5714", "0.6667", "0.6154", "6"] in table
    assert ["good", "0.6000", "0.7500", "0.6667", "4"] in table
    assert table[-4:] == [
        ["bad", "fair", "good"],
        ["bad", "6", "3", "1"],
        ["fair", "1", "4", "1"],
        ["good", "1", "0", "3"],
    ]


@pytest.mark.parametrize("labels", [("日本語", "한국어", "plain"), ("", "two\nlines", "x" * 200)])
def test_odd_labels_keep_the_table_aligned(labels: tuple[str, ...]) -> None:
    from jaxft.reporting.cells import cells_of

    text = report_text(metrics_of(CONFUSION, labels), labels, [])
    assert len({cells_of(line) for line in text.splitlines()[3:7]}) == 1
    assert len({cells_of(line) for line in text.splitlines()[-3:]}) == 1
    assert max(map(cells_of, text.splitlines())) <= 100


def test_labels_that_abbreviate_alike_get_numbers() -> None:
    labels = tuple(f"the same long beginning of a label, {i}" for i in range(8))
    confusion = [[10 * i + j for j in range(8)] for i in range(8)]
    text = report_text(metrics_of(confusion, labels), labels, [])
    assert ["#0", "#1", "#2", "#3", "#4", "#5", "#6", "#7"] in [line.split()[-8:] for line in text.splitlines()]
    assert text.splitlines()[-1].startswith("#7 the same")


def test_many_classes_list_confusions_and_worst_classes() -> None:
    metrics, labels = many(60)
    text = report_text(metrics, labels, [])
    assert "The 20 classes with the lowest F1 of 60" in text
    lines = text.splitlines()
    # The largest count, 3600, is on the diagonal; the next is row 59, column 58.
    (first,) = [i for i, line in enumerate(lines) if line.startswith("Most frequent confusions")]
    assert lines[first + 1].split()[:4] == ["3,599", "label", "number", "59"]
    assert "label number 58" in lines[first + 1]
    assert len(lines) == first + 11


def test_a_matrix_that_does_not_fit_says_so() -> None:
    metrics, labels = many(20)
    text = report_text(metrics, labels, [], width=60)
    assert "The whole matrix is wider than 60 columns." in text
    assert max(map(len, text.split("Most frequent")[0].splitlines()[1:])) <= 60


def test_no_confusion_at_all() -> None:
    labels = tuple(str(i) for i in range(21))
    text = report_text(metrics_of(np.diag(range(1, 22)).tolist(), labels), labels, [])
    assert "No row was taken for another class." in text


def test_curves_as_text_have_no_colours_unless_asked() -> None:
    metrics = metrics_of(CONFUSION)
    plain = report_text(metrics, LABELS, log_of(), width=80)
    assert "\x1b" not in plain
    assert "train, smoothed" in plain
    assert "● accuracy" in plain
    assert "micro F1" not in plain.splitlines()[-20:]
    assert max(map(len, plain.splitlines())) <= 80
    assert "\x1b" in report_text(metrics, LABELS, log_of(), width=80, colour=True)


@pytest.mark.parametrize(
    "log",
    [
        [{"step": 1, "kind": "train", "loss": 0.5}],
        [{"step": step, "kind": "eval", "loss": 0.5, "accuracy": 1.0} for step in (5, 6)],
        [{"step": 1, "kind": "train", "loss": math.nan}, {"step": 2, "kind": "train", "loss": math.inf}],
    ],
)
def test_short_flat_and_nonfinite_logs_can_be_drawn(tmp_path: Path, log: list[dict[str, Any]]) -> None:
    metrics = metrics_of(CONFUSION)
    assert report_text(metrics, LABELS, log)
    assert (tmp_path / "curves.png") in write_report(tmp_path, metrics, LABELS, log)


@pytest.mark.parametrize("count", [2, 7, 20, 150])
def test_files_of_a_report(tmp_path: Path, count: int) -> None:
    metrics, labels = many(count)
    written = write_report(tmp_path, metrics, labels, log_of())
    assert [path.name for path in written] == ["metrics.json", "confusion.png", "curves.png"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    for path in written[1:]:
        width, height = size_of(path)
        assert 400 < width < 1500
        assert 400 < height < 1500
        assert path.stat().st_size < 150_000


def test_labels_that_no_font_or_formula_parser_likes(tmp_path: Path) -> None:
    labels = ("$5 to $6", "日本語", "100% _^{")
    write_report(tmp_path, metrics_of(CONFUSION, labels), labels, [])
    assert size_of(tmp_path / "confusion.png")


def test_without_a_log_there_are_no_curves(tmp_path: Path) -> None:
    metrics = metrics_of(CONFUSION) | {"loss": math.nan}
    assert [p.name for p in write_report(tmp_path, metrics, LABELS, [])] == ["metrics.json", "confusion.png"]
    assert json.loads((tmp_path / "metrics.json").read_text())["loss"] is None


def test_smoothing_neither_lags_nor_starts_elsewhere() -> None:
    flat = smoothed(Series("loss", range(100), [2.0] * 50 + [math.nan] + [2.0] * 49))
    assert flat.values == pytest.approx([2.0] * 100)
    # A straight line stays one from its first point to its last.
    fall = [3.0 - 0.01 * step for step in range(200)]
    assert smoothed(Series("loss", range(200), fall)).values == pytest.approx(fall)
    # Noise around it becomes less: over 21 points, to a fifth.
    noise = np.random.default_rng(0).standard_normal(200)
    found = np.asarray(smoothed(Series("loss", range(200), list(fall + noise))).values) - fall
    assert np.std(found[20:-20]) < 0.35
    assert [math.isnan(v) for v in smoothed(Series("loss", [1, 2], [math.nan, 1.0])).values] == [True, False]


@pytest.mark.parametrize("values", [[0.9335], [0.93350, 0.93351], [5e-5, 5e-5], [0.5, 0.9], [0.0]])
def test_axes_bear_plain_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: list[float]) -> None:
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    log = [
        {"step": 10 * (i + 1), "kind": kind, "loss": value, "learning_rate": value, "accuracy": value}
        for i, value in enumerate(values)
        for kind in ("train", "eval")
    ]
    plots.curves_png(tmp_path / "x.png", log)
    (figure,) = figures
    figure.canvas.draw()
    for axes in figure.axes:
        offset = axes.yaxis.get_major_formatter().get_offset()
        assert "+" not in offset.replace("e+", "e")
        low, high = axes.get_ylim()
        assert low <= min(values) <= max(values) <= high
        assert high - low >= 0.05 * max(values)
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert len(set(labels)) == len(labels)
    text = plots.chart("eval", [], [Series("accuracy", range(len(values)), values)], 80, colour=False)
    ticks = [line.split("┤")[0].strip() for line in text.splitlines() if "┤" in line]
    assert len(set(ticks)) == len(ticks) > 0


def test_equal_score_curves_are_drawn_once() -> None:
    assert [series.name for series in score_series(log_of())] == ["accuracy", "macro_f1"]


def test_seeds_by_hand(tmp_path: Path) -> None:
    results = {seed: {"accuracy": value, "rows": 20} for seed, value in ((0, 0.80), (1, 0.86), (5, 0.83))}
    # mean 0.83; deviations -0.03, 0.03, 0: sd = sqrt(0.0018 / 2) = 0.03
    text = seeds_text(results)
    assert "0.8300 +- 0.0300" in text
    assert "rows" not in text
    tree = json.loads(write_seeds(tmp_path, results).read_text())
    assert tree["seeds"] == [0, 1, 5]
    assert tree["metrics"]["accuracy"]["mean"] == pytest.approx(0.83)
    assert tree["metrics"]["accuracy"]["sd"] == pytest.approx(0.03)
    assert tree["metrics"]["accuracy"]["values"] == [0.80, 0.86, 0.83]


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    assert "0.5000 +- n/a" in seeds_text({3: {"accuracy": 0.5}})
    assert json.loads(write_seeds(tmp_path, {3: {"accuracy": 0.5}}).read_text())["metrics"]["accuracy"]["sd"] is None
    with pytest.raises(ValueError, match="same metrics"):
        seeds_text({1: {"accuracy": 0.5}, 2: {"loss": 0.5}})


def test_schedules(tmp_path: Path) -> None:
    rates = [5e-5 * min(step / 10, (100 - step) / 90) for step in range(100)]
    text = schedule_text(rates, width=70)
    assert text.endswith("100 steps; peak 5.00e-05 at step 10; last 5.56e-07")
    assert "5e-05" in text
    assert max(map(len, text.splitlines())) <= 70
    assert "1 steps" in schedule_text([1e-5])
    schedule_png(tmp_path / "schedule.png", rates)
    width, height = size_of(tmp_path / "schedule.png")
    assert width > height > 300
    with pytest.raises(UserError, match="cannot be written"):
        schedule_png(tmp_path / "missing/schedule.png", rates)
