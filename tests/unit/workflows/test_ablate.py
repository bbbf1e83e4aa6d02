"""One setting is varied and nothing else, and the figure has a point for every value."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from azeotrope.config import ConfigError
from azeotrope.report.drawing import PlotLine, plot_figure
from azeotrope.report.intervals import Accuracy, mean_accuracy
from azeotrope.report.rows import ResultRow
from experiment import settings
from experiment.cells import cells_of
from experiment.preflight import preflight
from experiment.probes import BEGUN_METRIC
from workflows.ablate import plot, vary


def varied(
    setting: str, values: str, *overrides: str, name: str = "pocket_logits"
) -> settings.ExperimentConfig:
    config = settings.load(name, list(overrides))
    return vary(config, setting, yaml.safe_load(f"[{values}]"))


@pytest.mark.parametrize(
    ("setting", "values", "path"),
    [
        ("strength", "0.03, 0.1, 0.3", ("parts", 0, "strength")),
        ("rank", "8, 64", ("parts", 0, "rank")),
        ("layer", "last, penultimate, lm_head.weight", ("parts", 0, "layer")),
        ("training.rarest", "0.1, 1", ("training", "rarest")),
        ("parts.0.parametrisation", "logits, head", ("parts", 0, "parametrisation")),
    ],
)
def test_a_setting_of_the_defense_makes_one_defense_a_value(
    setting: str, values: str, path: tuple[Any, ...], tmp_path: Path
) -> None:
    config = varied(setting, values, f"cache={tmp_path}")
    wanted = yaml.safe_load(f"[{values}]")
    first = settings.load("pocket_logits", []).defenses[0].dump()

    def value_of(dumped: Any) -> Any:
        for key in path:
            dumped = dumped[key]
        return dumped

    found = [choice.dump() for choice in config.defenses]
    assert [value_of(item) for item in found] == wanted
    assert [item["name"] for item in found] == [f"cmi,{setting}={value}" for value in wanted]
    for item in found:
        # Nothing else is another than in the experiment, but for the floor.
        assert item["training"]["floor"] is None
        inner = item
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value_of(first)
        kept = {**first, "name": item["name"], "training": {**first["training"], "floor": None}}
        assert item == kept
    assert {attack["variant"] for attack in config.attacks} == {"none"}
    # The experiment can be run, and its exams are not the test problems.
    assert (config.exam_split, config.cleanups) == ("validation", ())
    preflight(config)
    defended = {cell.defense for cell in cells_of(config)}
    assert defended == {"none", *(item["name"] for item in found)}


@pytest.mark.parametrize("setting", ["kd_weight", "temperature", "tau"])
def test_a_setting_of_the_attacks_makes_each_attack_once_a_value(
    setting: str, tmp_path: Path
) -> None:
    config = varied(setting, "0.5, 1", f"cache={tmp_path}")
    key = "temperature" if setting == "tau" else setting
    plain = ["forward_kl", "reverse_kl", "alpha", "alphanet", "abkd"]
    found = [(item["name"], item["variant"], item[key]) for item in config.attacks]
    assert found == [(name, f"{key}={v}", v) for name in plain for v in (0.5, 1)]
    assert [choice.label for choice in config.defenses] == ["cmi"]
    assert config.name == f"pocket_logits-{key}"
    preflight(config)
    cells = [(cell.defense, cell.attack, cell.variant) for cell in cells_of(config)]
    for defense in ("none", "cmi"):
        for name, variant, _ in found:
            assert cells.count((defense, name, variant)) == len(config.seeds)


@pytest.mark.parametrize(
    ("setting", "values", "overrides", "message"),
    [
        ("rank", "8", [], r"an ablation compares two values or more, got \[8\]"),
        ("rank", "8, 8", [], "an ablation compares two values or more"),
        ("rank", "0, 8", [], "greater than or equal to 1, got 0"),
        ("rank", "8, 161", [], "rank 161 is larger than the teacher's hidden size 160"),
        ("layer", "last, first", [], "the surrogate has no tensor 'first'"),
        ("strength", "-1, 1", [], "greater than or equal to 0, got -1"),
        ("rnak", "8, 16", [], "unknown key 'rnak'"),
        ("kd_weight", "0.5, 1.5", [], "less than or equal to 1, got 1.5"),
        ("tau", "0, 1", [], "temperature: Input should be greater than 0, got 0"),
        ("tau", "1, 2", ["attacks=[]"], "temperature belongs to attacks on logits"),
        ("rank", "8, 16", ["defenses=[]"], "an ablation needs a defense; `defenses` is empty"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_it_runs(
    setting: str, values: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(varied(setting, values, f"cache={tmp_path}", *overrides))


def row(value: float, **more: Any) -> ResultRow:
    return ResultRow(
        **{
            "role": "student", "model": "small", "task": "pocket", "metric": "accuracy",
            "defense": "none", "strength": 0.1, "attack": "forward_kl", "cleanup": "none",
            "decoding": "greedy", "value": value, "n": 200, "ci95": (0.0, 1.0), **more,
        }
    )  # fmt: skip


def line(found: list[PlotLine], label: str) -> PlotLine:
    (wanted,) = [item for item in found if item.label == label]
    return wanted


def test_a_defenses_values_are_drawn_for_teacher_and_students() -> None:
    rows = [
        row(0.99, role="teacher", model="teacher", attack="none", defense="cmi,strength=0.3"),
        row(0.95, role="teacher", model="teacher", attack="none", defense="cmi,strength=0.03"),
        row(0.2, defense="cmi,strength=0.3", seed=0), row(0.3, defense="cmi,strength=0.3", seed=1),
        row(0.6, defense="cmi,strength=0.03"), row(0.8),
        row(0.5, defense="cmi,strength=0.03", metric="repeated"),
        row(0.4, role="teacher", model="teacher", attack="none", defense="cmi,strength=0.3",
            decoding="none", metric=BEGUN_METRIC),
    ]  # fmt: skip
    found = plot(rows, "strength", [0.3, 0.03])
    assert line(found.lines, "teacher, greedy").x == [0.03, 0.3]
    assert line(found.lines, "teacher, greedy").y == pytest.approx([0.95, 0.99])
    student = line(found.lines, "small: forward_kl")
    expected = mean_accuracy([Accuracy(0.2, 200), Accuracy(0.3, 200)])
    assert student.y == pytest.approx([0.6, 0.25])
    assert (student.low[1], student.high[1]) == pytest.approx((expected.lo, expected.hi))
    assert line(found.lines, "teacher, begun by others").y == pytest.approx([0.4])
    # The undefended student has no value of the setting.
    assert len(found.lines) == 3
    assert found.log_x
    plot_figure(found)


def test_words_stand_beside_each_other_in_the_order_given() -> None:
    rows = [row(0.4, defense=f"cmi,layer={layer}") for layer in ("penultimate", "last")]
    found = plot(rows, "layer", ["last", "penultimate"])
    assert found.ticks == ["last", "penultimate"]
    assert line(found.lines, "small: forward_kl").x == [0.0, 1.0]
    assert not found.log_x
    plot_figure(found)


@pytest.mark.parametrize("setting", ["temperature", "tau"])
def test_an_attacks_values_are_drawn_for_every_teacher(setting: str) -> None:
    rows = [
        row(value, defense=defense, variant=f"temperature={tau}")
        for defense, tau, value in (
            ("none", 1, 0.7), ("none", 4, 0.8), ("cmi", 1, 0.2), ("cmi", 4, 0.3),
        )
    ]  # fmt: skip
    found = plot(rows, setting, [1, 4])
    assert line(found.lines, "small: forward_kl, clean").y == pytest.approx([0.7, 0.8])
    assert line(found.lines, "small: forward_kl, cmi").y == pytest.approx([0.2, 0.3])
    assert found.x_label == "temperature"
