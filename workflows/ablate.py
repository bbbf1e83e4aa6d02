"""Vary one setting, keep the rest, and draw what it does to the teacher and to its thieves.

    azeotrope ablate pocket_logits strength 0.03,0.1,0.3
    azeotrope ablate pocket_logits kd_weight 0.25,0.5,0.75,1 seeds=[0]

Settings of the first defense: `strength`, `rank`, `layer`, or any path within it, such as
`training.rarest`. Settings of the attacks on logits: `kd_weight`, `temperature` (or `tau`). Exams
are on the validation problems, because this is how settings are chosen; and heads are trained
without a utility floor, so that the cost of a setting shows.
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

OF_ATTACKS = ("kd_weight", "temperature")
ALSO_CALLED = {"tau": "temperature"}
OF_DEFENSE = {name: f"parts.0.{name}" for name in ("strength", "rank", "layer")}
_WIDE = 8


def run(
    config: ExperimentConfig, setting: str, values: Sequence[Any], console: Console | None = None
) -> Path:
    """Run the ablation; returns the run folder, whose report has one more figure."""
    varied = vary(config, setting, values)
    folder = run_pipeline(varied, console)
    plots = json.loads((folder / "plots.json").read_text())
    rows = read_document(folder / "results.json")[1]
    drawn = plot(rows, setting, values)
    kept = [item for item in plots if item["name"] != drawn.name]
    write_json(folder / "plots.json", [drawn.dump(), *kept])
    write_report(folder)
    return folder


def vary(config: ExperimentConfig, setting: str, values: Sequence[Any]) -> ExperimentConfig:
    """The experiment with one defense, or one set of attacks, for each value.

    Raises:
        ConfigError: if there is nothing to vary, or a value does not fit.
    """
    setting = ALSO_CALLED.get(setting, setting)
    if len(set(map(str, values))) < 2:
        raise ConfigError(f"an ablation compares two values or more, got {list(values)}")
    if not config.defenses:
        raise ConfigError("an ablation needs a defense; `defenses` is empty")
    plain = [item for item in config.attacks if item["variant"] == "none"]
    attacks: list[dict[str, Any]] = plain
    choices = [_without_floor(config.defenses[0])]
    if setting in OF_ATTACKS:
        if not plain:
            raise ConfigError(f"{setting} belongs to attacks on logits; `attacks` has none")
        attacks = [
            {**item, setting: value, "variant": f"{setting}={value}"}
            for item in plain
            for value in values
        ]
    else:
        path = OF_DEFENSE.get(setting, setting)
        label = choices[0].label
        choices = [
            build(
                DefenseChoice,
                {**choices[0].dump(), "name": f"{label},{setting}={value}"},
                [f"{path}={json.dumps(value)}"],
                source=f"ablation of {setting}",
            )
            for value in values
        ]
    data = {
        **config.dump(),
        "name": f"{config.name}-{setting.replace('.', '-')}".lower(),
        "attacks": attacks,
        "defenses": [choice.dump() for choice in choices],
        "cleanups": [],
        "exam_split": "validation",
    }
    return build(ExperimentConfig, data, source=f"ablation of {setting}")


def _without_floor(choice: DefenseChoice) -> DefenseChoice:
    return choice.model_copy(
        update={"training": choice.training.model_copy(update={"floor": None}), "control": False}
    )


def plot(rows: Sequence[ResultRow], setting: str, values: Sequence[Any]) -> Plot:
    """Accuracy of the teacher and of every student against the setting."""
    setting = ALSO_CALLED.get(setting, setting)
    numbers = all(isinstance(value, int | float) for value in values)
    lines: dict[str, list[tuple[float, list[Accuracy]]]] = {}
    for place, value in enumerate(values):
        x = float(value) if numbers else float(place)
        for label, measured in _measured(rows, f"{setting}={value}").items():
            lines.setdefault(label, []).append((x, measured))
    drawn = [accuracy_line(label, points) for label, points in sorted(lines.items())]
    positive = numbers and min(values) > 0
    return Plot(
        name="ablation",
        title=f"What {setting} does",
        caption="The teacher's own answers, and students of its logits, on validation problems. "
        "Bands are 95 % intervals.",
        x_label=setting,
        y_label="accuracy",
        log_x=positive and max(values) / min(values) >= _WIDE,
        ticks=[] if numbers else [str(value) for value in values],
        lines=drawn,
    )


def _measured(rows: Sequence[ResultRow], tag: str) -> dict[str, list[Accuracy]]:
    """Accuracies of one value's defense, or of its attacks, by what the plot calls them."""
    found: dict[str, list[Accuracy]] = {}
    for row in rows:
        if row.metric not in ("accuracy", BEGUN_METRIC):
            continue
        of_defense, of_attack = row.defense.endswith(f",{tag}"), row.variant == tag
        if row.role == "teacher" and of_defense:
            label = f"teacher, {row.decoding if row.metric == 'accuracy' else 'begun by others'}"
        elif row.role == "student" and (of_defense or of_attack):
            who = "" if of_defense else f", {'clean' if row.defense == 'none' else row.defense}"
            label = f"{row.model}: {row.attack}{who}"
        else:
            continue
        found.setdefault(label, []).append(Accuracy(row.value, row.n))
    return found


def main(name: str, setting: str, values: str, overrides: list[str]) -> None:
    """What `azeotrope ablate` runs."""
    console = wide_console()
    folder = run(load(name, overrides), setting, yaml.safe_load(f"[{values}]"), console)
    print_findings(folder, console)
    session.stop()
