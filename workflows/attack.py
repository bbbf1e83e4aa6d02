"""Train the experiment's students on a folder of traces that you have, and examine them.

azeotrope attack pocket_demo path/to/traces
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors import session
from azeotrope.config import digest
from azeotrope.report.intervals import wilson
from azeotrope.traces import read_traces
from experiment.display import Display
from experiment.preflight import preflight
from experiment.settings import ExperimentConfig, load
from experiment.stages import Stage
from experiment.steps import Steps


def run(config: ExperimentConfig, folder: Path, console: Console) -> list[tuple[str, Stage]]:
    """One trained student for each student kind, clean-up and seed.

    Raises:
        FileNotFoundError: if the folder has no traces.
    """
    traces = read_traces(folder)
    # Nothing is defended here, so no proxy and no held-out problem is needed.
    preflight(config.model_copy(update={"proxies": (), "defenses": ()}))
    source = Stage("traces", digest([trace.id + trace.text for trace in traces]), folder, {})
    take = min(config.traces, len(traces))
    with Display(console) as display:
        steps = Steps(config, display)
        planned = [
            steps.plan_student(student, source, take, cleanup, seed, folder.name)
            for seed in config.seeds
            for student in config.students
            for cleanup in ("none", *config.cleanups)
        ]
        steps.students(planned)
    return [(item.label, item.stage) for item in planned]


def main(name: str, traces: str, overrides: list[str]) -> None:
    """What `azeotrope attack` runs."""
    console = Console()
    table = Table("student", "accuracy", "95 %", "checkpoint")
    for label, stage in run(load(name, overrides), Path(traces).resolve(), console):
        exam = read_traces(stage.path / "exam.parquet")
        right = sum(trace.correct for trace in exam)
        low, high = wilson(right, len(exam))
        table.add_row(
            label, f"{right / len(exam):.3f}", f"{low:.3f}-{high:.3f}", str(stage.path / "student")
        )
    console.print(table)
    session.stop()
