"""Figures: legends outside the panels, and colours that follow the defense."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from azeotrope.report.drawing import COLOURS, LossCurve, Plot, PlotLine, loss_figure, plot_figure
from azeotrope.report.figures import figures
from azeotrope.report.rows import ResultRow


def loss(label: str, group: str | None = None, kind: str = "student") -> LossCurve:
    columns = {"label": label, "group": group, "kind": kind, "x": [0, 1], "y": [2.0, 1.0]}
    return LossCurve.model_validate({**columns, "seed": 0})


def check_legends(figure: Figure) -> list[str]:
    """Labels of the legends, after a check that none lies over a panel or beyond the edge."""
    figure.draw_without_rendering()
    parts = [part for part in figure.subfigs if part.legends] or [figure]
    labels = []
    for part in parts:
        (legend,) = part.legends
        box = legend.get_window_extent()
        assert not any(axes.get_tightbbox().overlaps(box) for axes in part.axes)
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        labels += [text.get_text() for text in legend.get_texts()]
    assert not any(axes.get_legend() for axes in figure.axes)
    return labels


@pytest.mark.parametrize("count", [2, 8, 30])
def test_legends_of_losses_lie_outside(count: int) -> None:
    curves = [loss(f"small: doge attack_{i} none n=1000", f"group {i % 12}") for i in range(count)]
    figure = loss_figure([*curves, loss("doge head, pass 1", kind="head")])
    assert figure is not None
    labels = check_legends(figure)
    # Many curves are named by their groups.
    assert len(labels) == (count if count <= 8 else 12) + 1


def test_legends_of_plots_lie_outside() -> None:
    lines = [PlotLine(label=f"a line of number {i}", x=[0, 1], y=[i, i + 1]) for i in range(10)]
    plot = Plot(name="many", title="", caption="", x_label="x", y_label="y", lines=lines)
    figure = plot_figure(plot)
    assert len(check_legends(figure)) == 10
    drawn = [(to_hex(line.get_color()), line.get_linestyle()) for line in figure.axes[0].lines]
    # There are fewer colours than lines, so the line style tells them apart.
    assert len(set(drawn)) == 10


def test_a_defense_has_one_colour_in_every_bar() -> None:
    columns = {"role": "student", "model": "small", "task": "pocket", "metric": "accuracy"}
    columns |= {"value": 0.5, "n": 100, "ci95": (0.4, 0.6), "traces": 100}
    rows = [
        ResultRow.model_validate({**columns, "defense": defense, "attack": attack})
        for defense in ("none", "doge", "cmi")
        for attack in ("text_sft", "forward_kl")
    ]
    (axes,) = figures(rows)["students"].axes
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert colours == [colour.lower() for colour in COLOURS[:3] for _ in range(2)]
