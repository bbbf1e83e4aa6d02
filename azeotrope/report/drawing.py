"""Plots described in words and numbers -> matplotlib figures, PNG files and inline SVG."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import NullFormatter, ScalarFormatter
from pydantic import Field

from azeotrope.config import Config

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
"""Okabe and Ito 2008, "Color Universal Design", for colour-blind readers; without their yellow,
which is too pale for lines on white, and with a violet in place of their black."""
GREY = "#6b7280"
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MARKED = 20
"""Points of a line up to which each one is marked."""


class LossCurve(Config):
    """One entry of `curves.json`; `x` counts steps and `y` is nats per token."""

    label: str
    group: str | None = Field(
        default=None, description="curves of one group share a colour where there are many"
    )
    kind: Literal["student", "head"]
    x: list[float]
    y: list[float]
    seed: int


class PlotLine(Config):
    """One line of a plot; `low` and `high` bound a 95 % band and may be empty.

    Without `connected` only its points are drawn.
    """

    label: str
    x: list[float]
    y: list[float]
    low: list[float] = Field(default=[])
    high: list[float] = Field(default=[])
    connected: bool = True


class Plot(Config):
    """One entry of `plots.json`: a figure that a run describes in words and numbers."""

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
    points = [line for line in plot.lines if not line.connected]
    for number, line in enumerate(plot.lines):
        # Points over the same tick are set side by side.
        shift = 0.0 if line.connected else points.index(line) - (len(points) - 1) / 2
        _draw_line(axes, line, number, 0.08 * shift)
    if plot.log_x:
        log_axis(axes, {x for line in plot.lines for x in line.x})
    if plot.ticks:
        axes.set_xticks(range(len(plot.ticks)), plot.ticks)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    legend_below(figure, [axes])
    finish(axes)
    return figure


def _draw_line(axes: Axes, line: PlotLine, number: int, shift: float) -> None:
    x, colour = [value + shift for value in line.x], COLOURS[number % len(COLOURS)]
    # Colours come round again after seven lines; the line style or the marker then differs.
    turn = number // len(COLOURS)
    if not line.connected:
        arms = None
        if line.low:
            arms = [
                [y - low for y, low in zip(line.y, line.low, strict=True)],
                [high - y for y, high in zip(line.y, line.high, strict=True)],
            ]
        marker = MARKERS[turn % len(MARKERS)]
        axes.errorbar(x, line.y, yerr=arms, fmt=marker, color=colour, capsize=3, label=line.label)
        return
    style = LINE_STYLES[turn % len(LINE_STYLES)]
    marker = "o" if 2 < len(x) <= MARKED else ""
    axes.plot(
        x, line.y, linestyle=style, marker=marker, color=colour, linewidth=1.4, label=line.label
    )
    if line.low:
        axes.fill_between(x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)


def log_axis(axes: Axes, ticks: Iterable[float]) -> None:
    """A horizontal axis in powers of two that names its ticks in full."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sorted(set(ticks)))
    axes.tick_params(axis="x", labelrotation=45)


def legend_below(figure: FigureBase, grid: Iterable[Axes]) -> None:
    """One legend for all panels, outside of them; a label in several panels is listed once."""
    handles: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # In inches: a line with its gaps, and a letter. A legend that is wider than its figure would
    # be cut off.
    widest = 0.6 + 0.07 * max(map(len, handles), default=0)
    width = figure.bbox.width / figure.dpi
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=max(1, min(len(handles), 5, int(width / widest))),
        frameon=False,
        fontsize=9,
    )


def finish(axes: Axes) -> None:
    """The look that all figures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


GROUPED = 8
"""Loss curves of one kind up to which each has a colour of its own."""


def loss_figure(curves: Sequence[LossCurve]) -> Figure | None:
    """Training losses in one panel per kind, with their legends below; None without curves."""
    if not curves:
        return None
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    legends = {kind: _loss_names([c for c in curves if c.kind == kind]) for kind in kinds}
    rows = sum(2.9 + 0.19 * -(-len(set(names.values())) // 2) for names in legends.values())
    figure = Figure(figsize=(7.2, rows), layout="constrained")
    parts = figure.subfigures(len(kinds), 1, squeeze=False)[:, 0]
    for part, kind in zip(parts, kinds, strict=True):
        axes = part.subplots()
        names = legends[kind]
        order = list(dict.fromkeys(names.values()))
        for curve in curves:
            if curve.kind == kind:
                name = names[curve.label]
                number = order.index(name)
                axes.plot(
                    curve.x,
                    curve.y,
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)],
                    linewidth=1.2,
                    alpha=0.8,
                    label=name,
                )
        axes.set_title(f"{kind} training", fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        legend_below(part, [axes])
        finish(axes)
    return figure


def _loss_names(curves: Sequence[LossCurve]) -> dict[str, str]:
    """Label of a curve -> its name in the legend: the label, or its group if there are many."""
    labels = {curve.label: curve.label for curve in curves}
    if len(labels) <= GROUPED:
        return labels
    return {curve.label: curve.group or curve.label for curve in curves}


def save_pngs(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure as `NAME.png`, at twice the resolution of a common screen."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")


def svg(figure: Figure) -> str:
    """The figure as a data address; the same figure always gives the same bytes."""
    target = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "azeotrope"}):
        figure.savefig(target, format="svg", facecolor="white", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(target.getvalue()).decode()
