"""Figures of a run's rows and logs: what is drawn, from which rows, and what is left out."""

from typing import Any

import pytest

from azeotrope.report.drawing import Plot, PlotLine, plot_figure
from azeotrope.report.intervals import Accuracy, mean_accuracy
from azeotrope.report.rows import ResultRow
from experiment.plots import plots_of


def student(
    value: float, defense: str = "none", attack: str = "forward_kl", cleanup: str = "none",
    **more: Any,
) -> ResultRow:  # fmt: skip
    return ResultRow(
        **{
            "role": "student", "model": "small", "task": "pocket", "metric": "accuracy",
            "defense": defense, "strength": 0.0 if defense == "none" else 0.1, "attack": attack,
            "cleanup": cleanup, "value": value, "n": 200, "ci95": (0.0, 1.0), **more,
        }
    )  # fmt: skip


def information(value: float, defense: str) -> ResultRow:
    return student(value, defense, "none", role="teacher", model="teacher", metric="information")


def named(rows: list[ResultRow], heads: list[Any] = []) -> dict[str, Plot]:  # noqa: B006
    found = plots_of(rows, heads)
    assert len({plot.name for plot in found}) == len(found)
    for plot in found:
        # Whatever is described can be drawn.
        plot_figure(plot)
        assert Plot.model_validate(plot.dump()) == plot
    return {plot.name: plot for plot in found}


def line(plot: Plot, label: str) -> PlotLine:
    (found,) = [item for item in plot.lines if item.label == label]
    return found


def test_a_run_without_logits_has_no_further_plots() -> None:
    rows = [student(0.5, attack="text_sft"), student(0.4, "doge", "text_sft"), student(0.3)]
    heads = [("doge", [{"log": [[1, 2.0]], "parts": [{}]}]), ("older", [{"log": [[1, 2.0]]}])]
    assert named(rows[:2], heads) == {}
    assert named([], []) == {}


# Terms of the loss


def head(*log: tuple[float, dict[str, float]]) -> dict[str, Any]:
    return {"log": [[i + 1, loss] for i, (loss, _) in enumerate(log)], "parts": [p for _, p in log]}


def test_terms_run_on_over_the_passes() -> None:
    first = head((2.0, {"cross-entropy": 1.9, "cosine": 1.0}), (1.5, {"cross-entropy": 1.5}))
    second = head((1.0, {"cross-entropy": 0.9, "cosine": 0.5}))
    plot = named([], [("cmi", [first, second])])["head_terms_1_cmi"]
    assert [item.label for item in plot.lines] == ["loss", "cosine", "cross-entropy"]
    assert (line(plot, "loss").x, line(plot, "loss").y) == ([1, 2, 3], [2.0, 1.5, 1.0])
    # A batch without ground truth has no cosine, which is not the same as one of 0.
    assert (line(plot, "cosine").x, line(plot, "cosine").y) == ([1, 3], [1.0, 0.5])
    assert line(plot, "cross-entropy").y == [1.9, 1.5, 0.9]
    assert plot.caption.startswith("2 passes")
    assert "cmi" in plot.title


def test_terms_of_a_composition_begin_where_there_are_terms() -> None:
    both = [head((3.0, {}), (2.5, {})), head((1.0, {"cosine": 0.5}))]
    plot = named([], [("doge+cmi", both)])["head_terms_1_doge_cmi"]
    assert line(plot, "loss").x == [1, 2, 3]
    assert line(plot, "cosine").x == [3]


@pytest.mark.parametrize(
    "labels", [("cmi", "cmi"), ("cmi,rank=4", "cmi+rank=4"), ("dé", "CMI"), ("é", "ß")]
)
def test_names_of_files_never_clash(labels: tuple[str, str]) -> None:
    one = head((1.0, {"cosine": 0.5}))
    assert len(named([], [(label, [one]) for label in labels])) == 2


# Accuracy


def test_divergences_stand_beside_each_other() -> None:
    rows = [
        student(0.50, seed=0), student(0.54, seed=1), student(0.30, "cmi"),
        student(0.60, attack="reverse_kl"),
        student(0.90, variant="top_k=5"), student(0.45, attack="sft_only"),
        student(0.70, attack="text_sft"), student(0.99, metric="repeated"),
    ]  # fmt: skip
    plot = named(rows)["divergences"]
    assert plot.ticks == ["forward_kl", "reverse_kl"]
    clean, cmi = line(plot, "clean"), line(plot, "cmi")
    expected = mean_accuracy([Accuracy(0.50, 200), Accuracy(0.54, 200)])
    assert clean.y == pytest.approx([0.52, 0.60])
    assert (clean.low[0], clean.high[0]) == pytest.approx((expected.lo, expected.hi))
    assert (cmi.x, cmi.y) == ([0.0], [0.30])
    assert not clean.connected
    assert line(plot, "ground truth alone").y == [0.45, 0.45]
    assert len(plot.lines) == 3


def test_two_students_are_named() -> None:
    rows = [
        *(student(v, model=m) for v, m in ((0.5, "small"), (0.6, "large"))),
        *(student(v, attack="sft_only", model=m) for v, m in ((0.3, "small"), (0.4, "large"))),
    ]
    plot = named(rows)["divergences"]
    assert {item.label: item.y[0] for item in plot.lines} == {
        "clean, small": 0.5,
        "clean, large": 0.6,
        "ground truth alone, small": 0.3,
        "ground truth alone, large": 0.4,
    }


def test_pairs_undo_the_matrix_step_by_step() -> None:
    rows = [
        student(0.70), student(0.30, "cmi"), student(0.40, "cmi", variant="pairs=16"),
        student(0.35, "cmi", variant="pairs=8", seed=0),
        student(0.37, "cmi", variant="pairs=8", seed=1),
        student(0.68, "cmi", variant="pairs=256"), student(0.10, "cmi", variant="pairs=x"),
        student(0.65, "cmi", variant="top_k=5"),
    ]  # fmt: skip
    plot = named(rows)["inversion"]
    undone = line(plot, "small: cmi, forward_kl, matrix undone")
    assert undone.x == [8, 16, 256]
    assert undone.y == pytest.approx([0.36, 0.40, 0.68])
    assert all(low < y < high for low, y, high in zip(undone.low, undone.y, undone.high))  # noqa: B905
    assert (line(plot, "matrix left").x, line(plot, "matrix left").y) == ([8, 256], [0.30, 0.30])
    assert line(plot, "clean logits").y == [0.70, 0.70]
    assert plot.log_x


def test_without_pairs_there_is_no_inversion() -> None:
    assert "inversion" not in named([student(0.7), student(0.3, "cmi", variant="top_k=5")])


def test_information_meets_accuracy_teacher_by_teacher() -> None:
    rows = [
        information(0.9, "none"), information(0.4, "cmi"), information(0.6, "style"),
        student(0.7), student(0.3, "cmi"), student(0.5, "style"),
        student(0.6, "cmi", "reverse_kl"), student(0.1, "cmi", variant="pairs=8"),
        student(0.2, "cmi", "text_sft"), student(0.2, attack="sft_only"),
        student(0.8, "doge"),
    ]  # fmt: skip
    plot = named(rows)["information"]
    # Points go from little information to much.
    assert line(plot, "forward_kl").x == [0.4, 0.6, 0.9]
    assert line(plot, "forward_kl").y == pytest.approx([0.3, 0.5, 0.7])
    assert (line(plot, "reverse_kl").x, line(plot, "reverse_kl").y) == ([0.4], [0.6])
    assert len(plot.lines) == 2


def test_one_teacher_makes_no_relation() -> None:
    assert "information" not in named([information(0.9, "none"), student(0.7)])
    assert "information" not in named([information(0.9, "none"), information(0.5, "cmi")])


def test_strengths_of_one_name_are_told_apart() -> None:
    rows = [
        information(0.9, "none"), information(0.5, "cmi"),
        information(0.4, "cmi").model_copy(update={"strength": 0.3}),
        student(0.7), student(0.5, "cmi"), student(0.3, "cmi", strength=0.3),
    ]  # fmt: skip
    plots = named(rows)
    assert {item.label: item.y for item in plots["divergences"].lines} == {
        "clean": [0.7],
        "cmi (0.1)": [0.5],
        "cmi (0.3)": [0.3],
    }
    assert line(plots["information"], "forward_kl").x == [0.4, 0.5, 0.9]
