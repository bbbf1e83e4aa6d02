"""Result rows -> the figures of every report.

A defense has the same colour in all of them, and an attack the same marker or line style in one.
"""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from azeotrope.report.drawing import (
    COLOURS,
    GREY,
    LINE_STYLES,
    MARKERS,
    LossCurve,
    finish,
    legend_below,
    log_axis,
    loss_figure,
)
from azeotrope.report.headlines import Headline, bought, headline
from azeotrope.report.intervals import Accuracy, Estimate, mean_accuracy
from azeotrope.report.lines import Index, Line
from azeotrope.report.rows import ResultRow
from azeotrope.report.tables import times

Panel = tuple[str, str]
"""A task and a student."""


def figures(
    rows: Sequence[ResultRow], curves: Sequence[LossCurve] = (), traces: int | None = None
) -> dict[str, Figure]:
    """The figures that the data allow, by file name without its ending."""
    index = Index(rows, traces)
    headlines, colours = headline(rows, traces), _colours(index.lines())
    drawn = {
        "utility_vs_gain": _utility_figure(headlines, colours),
        "budget_curve": _budget_figure(index, headlines, colours),
        "students": _bar_figure(index, colours),
        "loss_curves": loss_figure(curves),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _utility_figure(headlines: Sequence[Headline], colours: Mapping[str, str]) -> Figure | None:
    points = [
        item
        for item in headlines
        if item.is_naive and item.utility_kept.defined and item.gain_removed.defined
    ]
    if not points:
        return None
    panels = _panels(item.line for item in points)
    figure = Figure(figsize=(max(5.6, 4.0 * len(panels)), 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    markers = _markers(item.line for item in points)
    ends = [end for item in points for end in (item.gain_removed.lo, item.gain_removed.hi)]
    low = max(-1.0, min(-0.1, *ends) - 0.05)
    high = min(2.0, max(1.05, *ends) + 0.05)
    for axes, panel in zip(grid, panels, strict=True):
        for item in points:
            line = item.line
            if _panel(line) == panel:
                style = (colours[line.defense_label], markers[line.attack])
                _utility_point(axes, item, style, (low, high))
        axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_title(f"student {panel[1]}", fontsize=10)
        axes.set_xlabel("utility kept (teacher, defended / clean)")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        finish(axes)
    grid[0].set_ylabel("gain removed")
    grid[0].set_ylim(low, high)
    leftmost, rightmost = grid[0].get_xlim()
    grid[0].set_xlim(min(leftmost, 0.9), max(rightmost, 1.02))
    legend_below(figure, grid)
    return figure


def _utility_point(
    axes: Axes, item: Headline, style: tuple[str, str], limits: tuple[float, float]
) -> None:
    axes.errorbar(
        item.utility_kept.value,
        item.gain_removed.value,
        xerr=_arms(item.utility_kept, 0.0, 2.0),
        yerr=_arms(item.gain_removed, *limits),
        fmt=style[1],
        color=style[0],
        capsize=3,
        markersize=7,
        elinewidth=1.0,
        alpha=0.85,
        label=item.line.label,
    )


def _budget_figure(
    index: Index, headlines: Sequence[Headline], colours: Mapping[str, str]
) -> Figure | None:
    lines = [
        line
        for line in index.lines()
        if line.stolen and index.is_naive(line) and len(bought(index.curves[line])) > 1
    ]
    if not lines:
        return None
    panels = _panels(lines)
    figure = Figure(figsize=(max(5.6, 4.3 * len(panels)), 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    attacks = _numbers(line.attack for line in lines)
    prices = {item.line: item.price_multiplier for item in headlines}
    for axes, panel in zip(grid, panels, strict=True):
        inside = [line for line in lines if _panel(line) == panel]
        for line in inside:
            style = LINE_STYLES[attacks[line.attack] % len(LINE_STYLES)]
            curve = bought(index.curves[line])
            _budget_line(axes, curve, (colours[line.defense_label], style), line.label)
        for line in index.curves:
            if _panel(line) == panel and not line.stolen:
                style = "--" if line.attack == "none" else ":"
                level = mean_accuracy(index.measured(line)).value
                axes.axhline(level, color=GREY, linestyle=style, label=line.label)
        axes.set_title(_panel_title(panel[1], inside, prices), fontsize=9.5)
        log_axis(axes, (count for line in inside for count in bought(index.curves[line])))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("traces that the attacker observed")
        finish(axes)
    grid[0].set_ylabel("student accuracy")
    legend_below(figure, grid)
    return figure


def _budget_line(
    axes: Axes, curve: Mapping[int, Sequence[Accuracy]], style: tuple[str, str], label: str
) -> None:
    colour, line_style = style
    estimates = [mean_accuracy(measured) for measured in curve.values()]
    counts, values = list(curve), [estimate.value for estimate in estimates]
    axes.plot(counts, values, marker="o", linestyle=line_style, color=colour, label=label)
    lows, highs = [estimate.lo for estimate in estimates], [estimate.hi for estimate in estimates]
    axes.fill_between(counts, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _panel_title(model: str, lines: Sequence[Line], prices: Mapping[Line, Estimate]) -> str:
    priced = [line for line in lines if line in prices and prices[line].defined]
    return "\n".join([f"student {model}", *(f"{x.label}: {times(prices[x])}" for x in priced)])


def _bar_figure(index: Index, colours: Mapping[str, str]) -> Figure | None:
    lines = index.lines()
    if not lines:
        return None
    panels = _panels(lines)
    most = max(sum(_panel(line) == panel for line in lines) for panel in panels)
    # Panels stand above one another: the labels of the bars need the width.
    size = (7.2, (0.34 * most + 0.75) * len(panels) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        inside = [line for line in lines if _panel(line) == panel]
        for position, line in enumerate(inside):
            estimate = mean_accuracy(index.measured(line))
            axes.barh(
                position,
                estimate.value,
                color=colours[line.defense_label] if line.stolen else GREY,
                # Adaptive attacks are paler than the naive ones that they improve on.
                alpha=0.85 if index.is_naive(line) else 0.5,
                xerr=_arms(estimate, 0.0, 1.0),
                error_kw={"elinewidth": 1.2, "capsize": 3},
            )
        axes.set_yticks(range(len(inside)), [line.label for line in inside])
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_title(f"student {panel[1]}", fontsize=10, loc="left")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        finish(axes)
    grid[-1].set_xlabel("accuracy")
    return figure


def _panel(line: Line) -> Panel:
    return line.task, line.model


def _panels(lines: Iterable[Line]) -> list[Panel]:
    return list(dict.fromkeys(map(_panel, lines)))


def _numbers(names: Iterable[str]) -> dict[str, int]:
    """Names in the order of their first occurrence, numbered from 0."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _colours(lines: Iterable[Line]) -> dict[str, str]:
    """One colour per defense; the undefended teacher always has the first."""
    defenses = _numbers(line.defense_label for line in lines if line.defense != "none")
    rest = COLOURS[1:]
    return {name: rest[i % len(rest)] for name, i in defenses.items()} | {"none": COLOURS[0]}


def _markers(lines: Iterable[Line]) -> dict[str, str]:
    """One marker per attack."""
    attacks = _numbers(line.attack for line in lines)
    return {name: MARKERS[number % len(MARKERS)] for name, number in attacks.items()}


def _arms(estimate: Estimate, least: float, most: float) -> list[list[float]]:
    """Lengths of the two error bars, cut at the edges of the picture."""
    low, high = max(estimate.lo, least), min(estimate.hi, most)
    return [[max(estimate.value - low, 0.0)], [max(high - estimate.value, 0.0)]]
