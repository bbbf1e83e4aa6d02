"""Vary one setting, keep the rest, and plot its effect on the teacher and on its students.

    azeotrope ablate pocket_logits strength 0.03,0.1,0.3
    azeotrope ablate pocket_logits kd_weight 0.25,0.5,0.75,1 seeds=[0]

Settings of the first defense are `strength`, `rank`, `layer`, or any path within it, such as
`training.rarest`. Settings of the attacks on logits are `kd_weight` and `temperature` (or `tau`).
Exams use the validation problems, because an ablation serves to choose settings. Heads are trained
without a utility floor, so that the cost of a setting can be seen.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from actors import session
from azeotrope.config import ConfigError, build
from azeotrope.files import write_json
from azeotrope.report.drawing import Plot
from azeotrope.report.intervals import Accuracy
from azeotrope.report.page import write_report
from azeotrope.report.rows import ResultRow, read_document
from experiment.plots import accuracy_line
from experiment.probes import BEGUN_METRIC
from experiment.settings import DefenseChoice, ExperimentConfig, load
from experiment.terminal import print_findings, wide_console
from workflows.pipeline import run as run_pipeline

ATTACK_SETTINGS = ("kd_weight", "temperature")
ALIASES = {"tau": "temperature"}
DEFENSE_PATHS = {name: f"parts.0.{name}" for name in ("strength", "rank", "layer")}
LOG_SCALE_RATIO = 8
"""The horizontal axis is logarithmic if the largest value is this many times the smallest."""


def run(
    config: ExperimentConfig, setting: str, values: Sequence[Any], console: Console | None = None
) -> Path:
    """Run the ablation; returns the run folder, whose report has one more figure.

    Raises:
        ConfigError: if the setting cannot be varied, or the run would fail later.
        TrainingError: if a training is at fault, or workers failed too often.
        WorkerError: if a worker met bad data or a full disk.
    """
    folder = run_pipeline(vary(config, setting, values), console)
    rows = read_document(folder / "results.json")[1]
    figure = plot(rows, setting, values)
    plots = json.loads((folder / "plots.json").read_text())
    further_plots = [entry for entry in plots if entry["name"] != figure.name]
    write_json(folder / "plots.json", [figure.dump(), *further_plots])
    write_report(folder)
    return folder


def vary(config: ExperimentConfig, setting: str, values: Sequence[Any]) -> ExperimentConfig:
    """The experiment with one defense, or one set of attacks, per value.

    Raises:
        ConfigError: if there is nothing to vary, or a value does not fit.
    """
    setting = ALIASES.get(setting, setting)
    if len(set(map(str, values))) < 2:
        raise ConfigError(f"an ablation compares two values or more, got {list(values)}")
    if not config.defenses:
        raise ConfigError("an ablation needs a defense; `defenses` is empty")
    attacks = [spec for spec in config.attacks if spec["variant"] == "none"]
    choices = [_without_floor(config.defenses[0])]
    if setting in ATTACK_SETTINGS:
        attacks = _varied_attacks(attacks, setting, values)
    else:
        choices = _varied_defenses(choices[0], setting, values)
    settings = {
        **config.dump(),
        "name": f"{config.name}-{setting.replace('.', '-')}".lower(),
        "attacks": attacks,
        "defenses": [choice.dump() for choice in choices],
        "cleanups": [],
        "exam_split": "validation",
    }
    return build(ExperimentConfig, settings, source=f"ablation of {setting}")


def _without_floor(choice: DefenseChoice) -> DefenseChoice:
    training = choice.training.model_copy(update={"floor": None})
    return choice.model_copy(update={"training": training, "control": False})


def _varied_attacks(
    attacks: Sequence[dict[str, Any]], setting: str, values: Sequence[Any]
) -> list[dict[str, Any]]:
    """Every attack once per value; the variant names the value."""
    if not attacks:
        raise ConfigError(f"{setting} belongs to attacks on logits; `attacks` has none")
    return [
        {**attack, setting: value, "variant": f"{setting}={value}"}
        for attack in attacks
        for value in values
    ]


def _varied_defenses(
    choice: DefenseChoice, setting: str, values: Sequence[Any]
) -> list[DefenseChoice]:
    """The defense once per value; its name has the value at the end."""
    path = DEFENSE_PATHS.get(setting, setting)
    return [
        build(
            DefenseChoice,
            {**choice.dump(), "name": f"{choice.label},{setting}={value}"},
            [f"{path}={json.dumps(value)}"],
            source=f"ablation of {setting}",
        )
        for value in values
    ]


def plot(rows: Sequence[ResultRow], setting: str, values: Sequence[Any]) -> Plot:
    """Accuracy of the teacher and of every student against the setting."""
    setting = ALIASES.get(setting, setting)
    numeric = all(isinstance(value, int | float) for value in values)
    points: dict[str, list[tuple[float, list[Accuracy]]]] = {}
    for position, value in enumerate(values):
        x = float(value) if numeric else float(position)
        for label, accuracies in _accuracies(rows, f"{setting}={value}").items():
            points.setdefault(label, []).append((x, accuracies))
    positive = numeric and min(values) > 0
    return Plot(
        name="ablation",
        title=f"What {setting} does",
        caption="The teacher's own answers, and students of its logits, on validation problems. "
        "Bands are 95 % intervals.",
        x_label=setting,
        y_label="accuracy",
        log_x=positive and max(values) / min(values) >= LOG_SCALE_RATIO,
        ticks=[] if numeric else [str(value) for value in values],
        lines=[accuracy_line(label, line) for label, line in sorted(points.items())],
    )


def _accuracies(rows: Sequence[ResultRow], tag: str) -> dict[str, list[Accuracy]]:
    """The accuracies that belong to one value, by the labels of their lines.

    Args:
        tag: `setting=value`, in the name of a defense or of an attack's variant.
    """
    accuracies: dict[str, list[Accuracy]] = {}
    for row in rows:
        label = _line_label(row, tag)
        if label is not None:
            accuracies.setdefault(label, []).append(Accuracy(row.value, row.n))
    return accuracies


def _line_label(row: ResultRow, tag: str) -> str | None:
    """The line to which a row belongs; None if it belongs to none."""
    if row.metric not in ("accuracy", BEGUN_METRIC):
        return None
    of_defense, of_attack = row.defense.endswith(f",{tag}"), row.variant == tag
    if row.role == "teacher" and of_defense:
        return f"teacher, {row.decoding if row.metric == 'accuracy' else 'begun by others'}"
    if row.role == "student" and of_defense:
        return f"{row.model}: {row.attack}"
    if row.role == "student" and of_attack:
        teacher = "clean" if row.defense == "none" else row.defense
        return f"{row.model}: {row.attack}, {teacher}"
    return None


def main(name: str, setting: str, values: str, overrides: list[str]) -> None:
    """What `azeotrope ablate` runs."""
    console = wide_console()
    folder = run(load(name, overrides), setting, yaml.safe_load(f"[{values}]"), console)
    print_findings(folder, console)
    session.stop()
