"""Train and export defended teachers, without attacking them.

azeotrope defend pocket_demo
azeotrope defend my_model.yaml defenses.0.parts.0.strength=0.1
"""

from rich.console import Console
from rich.table import Table

from actors import session
from azeotrope.traces import read_traces
from experiment.defending import clean_teacher, defend
from experiment.display import Display
from experiment.preflight import preflight
from experiment.settings import ExperimentConfig, load
from experiment.stages import Stage
from experiment.steps import Steps
from experiment.teachers import TeacherResult


def run(config: ExperimentConfig, console: Console) -> list[TeacherResult]:
    """The undefended teacher first, then one result per choice of defense.

    Raises:
        ConfigError: if the run would fail later.
        TrainingError: if a training is at fault, or workers failed too often.
        WorkerError: if a worker met bad data or a full disk.
    """
    preflight(config, console)
    with Display(console) as display:
        steps = Steps.of(config, display)
        clean = clean_teacher(steps)
        return [clean, *(defend(steps, choice, clean) for choice in config.defenses)]


def accuracy(stage: Stage) -> float:
    """The share of right answers in a stage of traces."""
    traces = read_traces(stage.path)
    return sum(trace.correct for trace in traces) / len(traces)


def main(name: str, overrides: list[str]) -> None:
    """What `azeotrope defend` runs."""
    console = Console()
    table = Table("defense", "strength", "greedy", "sampled", "checkpoint")
    for teacher in run(load(name, overrides), console):
        table.add_row(
            teacher.label,
            f"{teacher.strength:g}",
            f"{accuracy(teacher.greedy):.3f}",
            f"{accuracy(teacher.sampled):.3f}",
            teacher.checkpoint or "-",
        )
    console.print(table)
    session.stop()
