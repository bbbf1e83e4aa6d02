"""Result rows -> figures, as matplotlib objects, PNG files and inline SVG."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter
from pydantic import Field

from azeotrope.config import Config
from azeotrope.report.headlines import Headline, bought, headline
from azeotrope.report.intervals import Accuracy, Estimate, mean_accuracy
from azeotrope.report.lines import Index, Line
from azeotrope.report.rows import ResultRow
from azeotrope.report.tables import times

# Okabe and Ito's palette, which stays apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")


GREY = "#6b7280"
MARKED = 20
"""Points of a line up to which each one is marked."""


class LossCurve(Config):
    """One entry of `curves.json`; `x` counts steps and `y` is nats a token."""

    label: str
    kind: Literal["student", "head"]
    x: list[float]
    y: list[float]
    seed: int


class PlotLine(Config):
    """One line of a plot; `low` and `high` bound a 95 % band and may be left out.

    Without `connected` only its points are drawn.
    """

    label: str
    x: list[float]
    y: list[float]
    low: list[float] = Field(default=[])
    high: list[float] = Field(default=[])
    connected: bool = True


class Plot(Config):
    """One entry of `plots.json`: a figure that a run asks for, in words and numbers."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="of the file")
    title: str
    caption: str
    x_label: str
    y_label: str
    log_x: bool = False
    ticks: list[str] = Field(default=[], description="names of x = 0, 1, 2, ...")
    lines: list[PlotLine]


def plot_figure(plot: Plot) -> Figure:
    """The figure that a plot describes."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    apart = [line for line in plot.lines if not line.connected]
    for number, line in enumerate(plot.lines):
        colour = COLOURS[number % len(COLOURS)]
        _plot_line(axes, line, colour, 0.08 * _place(line, apart))
    if plot.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({x for line in plot.lines for x in line.x}))
        axes.tick_params(axis="x", labelrotation=45)
    if plot.ticks:
        axes.set_xticks(range(len(plot.ticks)), plot.ticks)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    _legend_below(figure, [axes])
    _finish(axes)
    return figure


def _place(line: PlotLine, apart: Sequence[PlotLine]) -> float:
    """Points that stand over the same name are set side by side."""
    return apart.index(line) - (len(apart) - 1) / 2 if line in apart else 0.0


def _plot_line(axes: Axes, line: PlotLine, colour: str, shift: float) -> None:
    x = [value + shift for value in line.x]
    if not line.connected:
        arms = None
        if line.low:
            arms = [
                [y - low for y, low in zip(line.y, line.low, strict=True)],
                [high - y for y, high in zip(line.y, line.high, strict=True)],
            ]
        axes.errorbar(x, line.y, yerr=arms, fmt="o", color=colour, capsize=3, label=line.label)
        return
    style = "o-" if 2 < len(x) <= MARKED else "-"
    axes.plot(x, line.y, style, color=colour, linewidth=1.4, label=line.label)
    if line.low:
        axes.fill_between(x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)


def figures(
    rows: Sequence[ResultRow], curves: Sequence[LossCurve] = (), traces: int | None = None
) -> dict[str, Figure]:
    """The figures that the data allow, by file name without its ending."""
    index = Index(rows, traces)
    found = headline(rows, traces)
    drawn = {
        "utility_vs_gain": _utility_figure(found),
        "budget_curve": _budget_figure(index, found),
        "students": _bar_figure(index),
        "loss_curves": _loss_figure(curves),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _utility_figure(found: Sequence[Headline]) -> Figure | None:
    points = [
        item
        for item in found
        if item.is_naive and item.utility_kept.defined and item.gain_removed.defined
    ]
    if not points:
        return None
    panels = list(dict.fromkeys((item.line.task, item.line.model) for item in points))
    figure = Figure(figsize=(max(5.6, 4.0 * len(panels)), 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    colours = _colours(item.line for item in points)
    ends = [end for item in points for end in (item.gain_removed.lo, item.gain_removed.hi)]
    low = max(-1.0, min(-0.1, *ends) - 0.05)
    high = min(2.0, max(1.05, *ends) + 0.05)
    for axes, panel in zip(grid, panels, strict=True):
        for item in points:
            if (item.line.task, item.line.model) == panel:
                _utility_point(axes, item, colours[item.line.label], (low, high))
        axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_title(f"student {panel[1]}", fontsize=10)
        axes.set_xlabel("utility kept (teacher, defended / clean)")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _finish(axes)
    grid[0].set_ylabel("gain removed")
    grid[0].set_ylim(low, high)
    left, right = grid[0].get_xlim()
    grid[0].set_xlim(min(left, 0.9), max(right, 1.02))
    _legend_below(figure, grid)
    return figure


def _utility_point(axes: Axes, item: Headline, colour: str, limits: tuple[float, float]) -> None:
    axes.errorbar(
        item.utility_kept.value,
        item.gain_removed.value,
        xerr=_arms(item.utility_kept, 0.0, 2.0),
        yerr=_arms(item.gain_removed, *limits),
        fmt="o",
        color=colour,
        capsize=3,
        markersize=8,
        elinewidth=1.3,
        label=item.line.label,
    )


def _legend_below(figure: Figure, grid: Iterable[Axes]) -> None:
    """One legend for all panels; a name that several of them use is shown once."""
    named: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    # In inches: a line with its gaps, and a letter. What does not fit would be cut off.
    widest = 0.6 + 0.07 * max(map(len, named), default=0)
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=max(1, min(len(named), 5, int(figure.get_figwidth() / widest))),
        frameon=False,
        fontsize=9,
    )


def _budget_figure(index: Index, found: Sequence[Headline]) -> Figure | None:
    lines = [
        line
        for line in index.lines()
        if line.stolen and index.is_naive(line) and len(bought(index.curves[line])) > 1
    ]
    if not lines:
        return None
    panels = list(dict.fromkeys((line.task, line.model) for line in lines))
    figure = Figure(figsize=(max(5.6, 4.3 * len(panels)), 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    colours = _colours(lines)
    prices = {item.line: item.price_multiplier for item in found}
    for axes, panel in zip(grid, panels, strict=True):
        inside = [line for line in lines if (line.task, line.model) == panel]
        for line in inside:
            _budget_line(axes, bought(index.curves[line]), colours[line.label], line.label)
        for line in index.curves:
            if (line.task, line.model) == panel and not line.stolen:
                style = "--" if line.attack == "none" else ":"
                level = mean_accuracy(index.measured(line)).value
                axes.axhline(level, color=GREY, linestyle=style, label=line.label)
        axes.set_title(_panel_title(panel[1], inside, prices), fontsize=9.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({count for line in inside for count in bought(index.curves[line])}))
        axes.tick_params(axis="x", labelrotation=45)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("stolen traces")
        _finish(axes)
    grid[0].set_ylabel("student accuracy")
    _legend_below(figure, grid)
    return figure


def _budget_line(
    axes: Axes, curve: Mapping[int, Sequence[Accuracy]], colour: str, label: str
) -> None:
    estimates = [mean_accuracy(measured) for measured in curve.values()]
    counts = list(curve)
    axes.plot(counts, [item.value for item in estimates], "o-", color=colour, label=label)
    lows, highs = [item.lo for item in estimates], [item.hi for item in estimates]
    axes.fill_between(counts, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _panel_title(model: str, lines: Sequence[Line], prices: Mapping[Line, Estimate]) -> str:
    known = [line for line in lines if line in prices and prices[line].defined]
    return "\n".join([f"student {model}", *(f"{x.label}: {times(prices[x])}" for x in known)])


def _bar_figure(index: Index) -> Figure | None:
    lines = index.lines()
    if not lines:
        return None
    panels = list(dict.fromkeys((line.task, line.model) for line in lines))
    most = max(sum((line.task, line.model) == panel for line in lines) for panel in panels)
    # Panels stand above one another: the names of the bars need the width.
    size = (7.2, (0.34 * most + 0.75) * len(panels) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    colours = _colours(index.origin(line) for line in lines)
    for axes, panel in zip(grid, panels, strict=True):
        inside = [line for line in lines if (line.task, line.model) == panel]
        for place, line in enumerate(inside):
            estimate = mean_accuracy(index.measured(line))
            colour = colours[index.origin(line).label] if line.stolen else GREY
            axes.barh(
                place,
                estimate.value,
                color=colour,
                alpha=0.85 if index.is_naive(line) else 0.5,
                xerr=_arms(estimate, 0.0, 1.0),
                error_kw={"elinewidth": 1.2, "capsize": 3},
            )
        axes.set_yticks(range(len(inside)), [line.label for line in inside])
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_title(f"student {panel[1]}", fontsize=10, loc="left")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _finish(axes)
    grid[-1].set_xlabel("accuracy")
    return figure


def _loss_figure(curves: Sequence[LossCurve]) -> Figure | None:
    if not curves:
        return None
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    figure = Figure(figsize=(max(6.4, 4.4 * len(kinds)), 3.8), layout="constrained")
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        named: set[str] = set()
        for curve in curves:
            if curve.kind != kind:
                continue
            label = curve.label
            colour = COLOURS[labels.index(label) % len(COLOURS)]
            shown = None if label in named else label
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.3, alpha=0.9, label=shown)
            named.add(label)
        axes.set_title(f"{kind} training", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        axes.legend(frameon=False, fontsize=8)
        _finish(axes)
    return figure


def _colours(lines: Iterable[Line]) -> dict[str, str]:
    """One colour a label; what the undefended teacher gives always has the first."""
    stolen = [line for line in lines if line.stolen]
    rest = list(dict.fromkeys(line.label for line in stolen if line.defense != "none"))
    named = {label: COLOURS[1 + i % (len(COLOURS) - 1)] for i, label in enumerate(rest)}
    return named | {line.label: COLOURS[0] for line in stolen if line.defense == "none"}


def _arms(estimate: Estimate, least: float, most: float) -> list[list[float]]:
    """Lengths of the two error bars, cut at the edges of the picture."""
    low, high = max(estimate.lo, least), min(estimate.hi, most)
    return [[max(estimate.value - low, 0.0)], [max(high - estimate.value, 0.0)]]


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def save_pngs(drawn: Mapping[str, Figure], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")


def svg(figure: Figure) -> str:
    """The figure as a data address; the same figure always gives the same bytes."""
    target = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "azeotrope"}):
        figure.savefig(target, format="svg", facecolor="white", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(target.getvalue()).decode()
