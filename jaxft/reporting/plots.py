"""Pictures of numbers: PNG files drawn with matplotlib, and the same curves as text drawn with plotext.

matplotlib is used through its objects and the Agg canvas: no pyplot, hence no display and no global state.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxft.errors import UserError, printable
from jaxft.files import write_atomic
from jaxft.reporting.records import step_of

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
BLUE, _ORANGE, _GREEN, _RED, GRAY = "#2b6cb0", "#dd6b20", "#2f855a", "#c53030", "#a0aec0"
_MOST_POINTS = 4000
"""More points than pixels make files large and lines solid, and Agg refuses very long paths."""
_MOST_CELLS_WITH_TEXT = 20
_MARKS = "●+○*"
_ASCII_MARKS = "o+x@"
_ASCII = str.maketrans({**dict.fromkeys("┌┐└┘┤├┬┴┼", "+"), "│": "|", "─": "-", "…": "~"})
_FLAT = 1e-3
"""Share of its height by which a curve must move to be drawn as one that does."""


class Series(NamedTuple):
    """One curve; non-finite values are left out when it is drawn."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


_NO_SCORES = ("loss", "ece", "brier", "macro_ece", "macro_brier")


def series_of(log: Sequence[Mapping[str, float | str]], kind: str, name: str) -> Series:
    """The values of one name in the train or eval records of a log."""
    records = [record for record in log if record.get("kind") == kind and name in record]
    return Series(name, [step_of(record) for record in records], [float(record[name]) for record in records])


def score_series(log: Sequence[Mapping[str, float | str]]) -> list[Series]:
    """The curves of the evaluation scores: every float besides the loss and errors of calibration, which lie far from the others.

    Of equal curves, only the first: micro F1 is the accuracy when each row has one label.
    """
    names = dict.fromkeys(
        name
        for record in log
        if record.get("kind") == "eval"
        for name, value in record.items()
        if isinstance(value, float) and name not in _NO_SCORES
    )
    found: list[Series] = []
    for series in (series_of(log, "eval", name) for name in names):
        if all(list(series.values) != list(other.values) for other in found):
            found.append(series)
    return found


def smoothed(series: Series) -> Series:
    """The mean over about a tenth of the points around each one, and over fewer near both ends, as many on each side: so it
    neither lags behind the values nor starts from elsewhere. Non-finite values are passed over."""
    import numpy as np

    values = np.asarray(series.values, np.float64)
    finite = np.isfinite(values)
    kept = np.where(finite, values, 0.0)
    count, means = len(values), []
    for i in range(count):
        reach = min(count // 20, i, count - 1 - i)
        around = slice(i - reach, i + reach + 1)
        found = int(finite[around].sum())
        means.append(float(kept[around].sum()) / found if found else math.nan)
    return Series(f"{series.name}, smoothed", series.steps, means)


def _thinned(series: Series) -> Series:
    stride = math.ceil(len(series.steps) / _MOST_POINTS) or 1
    return Series(series.name, series.steps[::stride], series.values[::stride])


def plain_label(label: str) -> str:
    """A label on one line, visible even when empty, without codes that a terminal would obey."""
    shown = printable(label)
    return shown if shown.strip() else repr(label)


def abbreviated(text: str, length: int) -> str:
    """At most ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def lacking() -> str | None:
    """Why PNG files cannot be drawn here, as a note; None: they can."""
    return _lacking("PNGs", "matplotlib.figure", "PIL.Image")


def _lacking(what: str, *modules: str) -> str | None:
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        return f"no {what}: {error}; pip install 'jaxft[plots]'"
    return None


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, or UserError where none can be drawn."""
    reason = lacking()
    if reason is not None:
        raise UserError(reason)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as a small PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib writes its own PNGs through it

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)  # as new_figure() made it
    canvas.draw()
    picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    # A palette makes files a third as large; smoothed edges need few colours, and dithering would only add noise.
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        buffer, format="png", optimize=True, dpi=(_DPI, _DPI)
    )
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _drawable(labels: Sequence[str], length: int) -> tuple[list[str], str]:
    """The labels as matplotlib's default font can draw them, and a remark if some names had to become numbers."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    plain = [plain_label(label) for label in labels]
    lacking = [any(font.get_char_index(ord(char)) == 0 for char in label) for label in plain]
    shown = [f"#{i}" if lacking[i] else abbreviated(label, length) for i, label in enumerate(plain)]
    return shown, "\n#: class number, the font lacks the name" if any(lacking) else ""


def confusion_png(path: Path, confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> Path:
    """Heat map of a confusion matrix [C true, C predicted]: colours are shares of the true row, texts are counts (up to
    20 classes)."""
    count = len(labels)
    shares = [[cell / max(sum(row), 1) for cell in row] for row in confusion]
    side = min(max(3.0, 0.55 * count), 8.5)
    figure = new_figure(side + 2.6, side + 1.6)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, format=lambda share, _: f"{100 * share:.0f}%")
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    remark = _name_classes(axes, labels, side * 72 / count)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"Confusion, {sum(map(sum, confusion)):,} rows{remark}", fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if count <= _MOST_CELLS_WITH_TEXT:
        _write_cells(axes, confusion, shares, side * 72 / count)
    return save(figure, path)


def _name_classes(axes: Axes, labels: Sequence[str], cell_points: float) -> str:
    """Ticks with the names of the classes; returns a remark on them for the title."""
    shown, remark = _drawable(labels, 18)
    # Not every name of very many classes fits beside its row.
    stride = math.ceil(9.0 / cell_points)
    ticks = range(0, len(labels), stride)
    names = [shown[i] for i in ticks]
    size = min(10.0, 0.75 * stride * cell_points)
    # A letter is about 0.6 of the font size wide.
    if 0.6 * size * max(map(len, names)) < 0.9 * stride * cell_points:
        slant: dict[str, Any] = {}
    elif len(names) <= _MOST_CELLS_WITH_TEXT:
        slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    else:
        slant = {"rotation": 90}
    # A label is no formula: `$` means a dollar.
    axes.set_xticks(ticks, names, fontsize=size, parse_math=False, **slant)
    axes.set_yticks(ticks, names, fontsize=size, parse_math=False)
    return remark


def _write_cells(axes: Axes, confusion: Sequence[Sequence[int]], shares: list[list[float]], cell_points: float) -> None:
    longest = max(len(str(cell)) for row in confusion for cell in row)
    # A digit is about 0.65 of the font size wide; a cell keeps a little air.
    size = min(12.0, 0.8 * cell_points / (0.65 * longest))
    for i, row in enumerate(confusion):
        for j, cell in enumerate(row):
            colour = "white" if shares[i][j] > 0.55 else ("#1a202c" if cell else GRAY)
            axes.text(j, i, str(cell), ha="center", va="center", fontsize=size, color=colour)


def curves_png(path: Path, log: Sequence[Mapping[str, float | str]]) -> Path | None:
    """Loss, evaluation scores and learning rate over steps, one above the other; None if there is nothing to draw."""
    train, evaluated = series_of(log, "train", "loss"), series_of(log, "eval", "loss")
    scores, rate = score_series(log), series_of(log, "train", "learning_rate")
    present = {"loss": train.steps or evaluated.steps, "score": scores, "learning rate": rate.steps}
    panels = [name for name, found in present.items() if found]
    if not panels:
        return None
    heights = [1.0 if name == "learning rate" else 1.6 for name in panels]
    figure = new_figure(8.0, 0.6 + 1.7 * sum(heights))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, name in zip(grid, panels, strict=True):
        style(axes, name)
        if name == "loss":
            _draw_losses(axes, train, evaluated)
        elif name == "score":
            for series, colour in zip(scores, _cycle(len(scores)), strict=True):
                axes.plot(series.steps, series.values, "o-", ms=3.5, lw=1.4, color=colour, label=_words(series.name))
            axes.legend(frameon=False, fontsize=9)
            _scale(axes, [value for series in scores for value in series.values])
        else:
            _draw_rate(axes, rate, GRAY)
    grid[-1].set_xlabel("step")
    return save(figure, path)


def _draw_losses(axes: Axes, train: Series, evaluated: Series) -> None:
    if train.steps:
        raw, mean = _thinned(train), _thinned(smoothed(train))
        axes.plot(raw.steps, raw.values, color=BLUE, lw=0.8, alpha=0.35, label="train")
        axes.plot(mean.steps, mean.values, color=BLUE, lw=1.8, label="train, smoothed")
    if evaluated.steps:
        axes.plot(evaluated.steps, evaluated.values, "o-", ms=3.5, lw=1.4, color=_ORANGE, label="eval")
    axes.legend(frameon=False, fontsize=9)
    _scale(axes, [*train.values, *evaluated.values])


def _draw_rate(axes: Axes, rate: Series, colour: str) -> None:
    shown = _thinned(rate)
    axes.plot(shown.steps, shown.values, color=colour, lw=1.6)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _scale(axes, rate.values)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Plain numbers at the ticks, never such as ``+9.335e-1`` above them; and room around curves that hardly move."""
    axes.ticklabel_format(axis="y", useOffset=False)
    finite = [value for value in values if math.isfinite(value)]
    if finite and _is_flat(min(finite), max(finite)):
        middle = (min(finite) + max(finite)) / 2
        room = 0.05 * abs(middle) or 1.0
        axes.set_ylim(middle - room, middle + room)


def _is_flat(low: float, high: float) -> bool:
    return high - low <= _FLAT * max(abs(low), abs(high))


def _cycle(count: int) -> list[str]:
    colours = (_ORANGE, _GREEN, _RED, BLUE)
    return [colours[i % len(colours)] for i in range(count)]


def style(axes: Axes, name: str) -> None:
    """Names the vertical axis, and gives all pictures one look."""
    axes.set_ylabel(name)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def _words(name: str) -> str:
    return name.replace("_", " ").replace(" f1", " F1")


def schedule_png(path: Path, rates: Sequence[float]) -> Path:
    """The learning rate of every step."""
    figure = new_figure(8.0, 3.2)
    axes = figure.add_subplot()
    style(axes, "learning rate")
    _draw_rate(axes, Series("learning rate", range(len(rates)), rates), BLUE)
    axes.set_xlabel("step")
    return save(figure, path)


def shows_blocks(stream: object) -> bool:
    """Whether a text stream can show what curves are drawn with; where it says no encoding, it can."""
    encoding = getattr(stream, "encoding", None)
    try:
        f"▚▖{_MARKS}┤…".encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def in_ascii(text: str) -> str:
    """A chart or table with its lines and dots in ASCII; labels stay as they are."""
    return text.translate(_ASCII)


def chart(
    title: str, lines: Sequence[Series], points: Sequence[Series], width: int, *, colour: bool, blocks: bool = True
) -> str:
    """Curves against the step as text: ``lines`` joined and drawn first, ``points`` as marks over them.

    Args:
      blocks: draw with block and box characters; otherwise in ASCII.

    Returns:
      An empty string if there is no finite value; where plotext is not installed, a note that says so.
    """
    reason = _lacking("curves", "plotext")
    if reason is not None:
        return reason
    import plotext

    dots = _MARKS if blocks else _ASCII_MARKS
    marks = [("▚", "hd", series) if blocks else ("#", "#", series) for series in lines]
    joined = len(marks)
    marks += [(dots[i % len(dots)], dots[i % len(dots)], series) for i, series in enumerate(points)]
    finite = [(i < joined, key, marker, _finite(_thinned(series))) for i, (key, marker, series) in enumerate(marks)]
    finite = [entry for entry in finite if entry[-1].steps]
    if not finite:
        return ""
    # A figure of our own: plotext.figure is shared by the whole process. Only the limits of the terminal are global.
    plotext.terminal.limit(False, False)
    figure = type(plotext.figure)(plotext.terminal)
    figure.plot_size(width, 15)
    figure.theme("simple" if colour else "colorless")
    for line, _, marker, series in finite:
        signal = figure.signal(list(series.steps), list(series.values), marker=marker)
        if line:
            signal = signal.lines(True).density("full") if blocks else signal.lines(True)
        figure.draw(signal)
    # The key stands in the title: a legend box would cover data.
    figure.title("   ".join([title, *(f"{key} {_words(series.name)}" for _, key, _, series in finite)]))
    figure.label("step", axis="x")
    _rule(figure, "x", [step for *_, series in finite for step in (0, *series.steps)])
    _rule(figure, "y", [value for *_, series in finite for value in series.values])
    text = str(figure.build().string(colorless=not colour))
    plotext.terminal.limit()
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
    return text if blocks else in_ascii(text)


def _rule(figure: Any, axis: str, values: Sequence[float]) -> None:
    """Five ticks over the range of the values; plotext's own print steps as 1.7e3 and small rates at full length."""
    low, high = min(values), max(values)
    flat = low == high if axis == "x" else _is_flat(low, high)
    ticks = [low] if flat else [low + (high - low) * i / 4 for i in range(5)]
    if axis == "x":
        ticks = sorted({float(round(tick)) for tick in ticks})
    # A flat curve is drawn in the middle.
    figure.ruler(axis).lim(*((low - 1.0, high + 1.0) if flat else (low, high)))
    figure.ruler(axis).ticks(ticks, [f"{tick:.0f}" for tick in ticks] if axis == "x" else _told_apart(ticks))


def _told_apart(ticks: Sequence[float]) -> list[str]:
    """Numbers in as few digits as tell them apart, three at least."""
    shown = [f"{tick:.3g}" for tick in ticks]
    for digits in range(4, 9):
        if len(set(shown)) == len(ticks):
            break
        shown = [f"{tick:.{digits}g}" for tick in ticks]
    return shown


def _finite(series: Series) -> Series:
    pairs = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if math.isfinite(value)]
    return Series(series.name, [step for step, _ in pairs], [value for _, value in pairs])


def curves_by_name_png(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x_name: str, title: str
) -> Path:
    """Panels side by side with logarithmic axes: each of curves by name, of points (x, y)."""
    figure = new_figure(4.6 * len(panels), 4.4)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = dict(zip(names, (BLUE, _ORANGE, _GREEN, _RED, GRAY, "#6b46c1", "#97266d", "#2c7a7b") * 9, strict=False))
    for i, (name, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        style(axes, name)
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=1.4, color=colours[label], label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(x_name)
        if i == 0:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)
