"""Defend a teacher, attack it, and report what the defense was worth.

    azeotrope pipeline pocket_demo
    azeotrope pipeline pocket_full seeds=[0]

The run writes clean traces, trains the baselines (base student, ground truth only, clean traces,
answers only), writes defended traces, trains students on them with and without clean-ups, and
examines all of them. Then it writes `results.json` and `report.html` and prints a table. An
experiment without students ends with the exams of the teacher, clean and defended.

Every expensive computation is a cached stage: a run that was killed, or that shares stages with
another run, goes on from the stages that exist and ends with the same numbers.
"""

from pathlib import Path

from rich.console import Console

from actors import session
from azeotrope import __version__
from azeotrope.files import write_json
from experiment.comparison import Comparison
from experiment.defending import clean_models
from experiment.display import Display
from experiment.points import write_points
from experiment.preflight import preflight
from experiment.probes import probe
from experiment.results import link_stages, rows_of, write_results
from experiment.settings import ExperimentConfig, load
from experiment.steps import Steps
from experiment.terminal import print_findings, wide_console


def run(config: ExperimentConfig, console: Console | None = None) -> Path:
    """Run the whole experiment; returns the run folder.

    Raises:
        ConfigError: if the run would fail later.
        TrainingError: if a training is at fault, or workers failed too often.
        WorkerError: if a worker met bad data or a full disk.
    """
    folder = Path(config.runs).resolve() / config.name
    preflight(config, console)
    write_json(folder / "config.json", {"azeotrope": __version__, "config": config.dump()})
    with Display(console) as display:
        steps = Steps.of(config, display)
        clean, base_exams = clean_models(steps)
        teachers, students = Comparison(steps, clean).run()
        measured = probe(steps, clean, teachers)
        rows = rows_of(config, clean, base_exams, teachers, students) + measured.rows
    traces = [teacher.traces for teacher in (clean, *teachers)]
    heads = [head for teacher in teachers for head in teacher.heads]
    link_stages(folder, [*traces, *heads, *students.values()])
    write_points(config, folder, teachers)
    write_results(config, folder, rows, clean, teachers, students, measured.notes)
    return folder


def main(name: str, overrides: list[str]) -> None:
    """What `azeotrope pipeline` runs."""
    console = wide_console()
    folder = run(load(name, overrides), console)
    print_findings(folder, console)
    session.stop()
