"""Train the experiment's students on a folder of existing traces, and examine them.

azeotrope attack pocket_demo path/to/traces
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors import session
from azeotrope.attacks.cleanups.base import NO_CLEANUP
from azeotrope.config import digest
from azeotrope.report.intervals import wilson
from azeotrope.traces import read_traces
from experiment.display import Display
from experiment.preflight import preflight
from experiment.settings import ExperimentConfig, load
from experiment.stages import Stage
from experiment.steps import Steps
from experiment.steps.students import TrainingTexts


def run(config: ExperimentConfig, folder: Path, console: Console) -> list[tuple[str, Stage]]:
    """One trained student per kind of student, clean-up and seed.

    Raises:
        FileNotFoundError: if the folder has no traces.
        ConfigError: if the run would fail later.
        TrainingError: if a training is at fault, or workers failed too often.
    """
    traces = read_traces(folder)
    # No teacher is defended, so that no proxies and no held-out problems are needed.
    preflight(config.model_copy(update={"proxies": (), "defenses": ()}), console)
    # The folder is no stage of ours; its key stands for the texts in it.
    source = Stage("traces", digest([trace.id + trace.text for trace in traces]), folder, {})
    count = min(config.traces, len(traces))
    with Display(console) as display:
        students = Steps.of(config, display).students
        planned = [
            students.plan(student, TrainingTexts(source, count, cleanup), seed, folder.name)
            for seed in config.seeds
            for student in config.students
            for cleanup in (NO_CLEANUP, *config.cleanups)
        ]
        students.train(planned)
    return [(training.label, training.stage) for training in planned]


def main(name: str, traces: str, overrides: list[str]) -> None:
    """What `azeotrope attack` runs."""
    console = Console()
    table = Table("student", "accuracy", "95 %", "checkpoint")
    for label, stage in run(load(name, overrides), Path(traces).resolve(), console):
        exam = read_traces(stage.path / "exam.parquet")
        correct = sum(trace.correct for trace in exam)
        low, high = wilson(correct, len(exam))
        checkpoint = str(stage.path / "student")
        table.add_row(label, f"{correct / len(exam):.3f}", f"{low:.3f}-{high:.3f}", checkpoint)
    console.print(table)
    session.stop()
