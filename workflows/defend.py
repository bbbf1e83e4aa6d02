"""Train and export defended teachers, without attacking them.

azeotrope defend pocket_demo
azeotrope defend my_model.yaml defenses.0.parts.0.strength=0.1
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors import session
from azeotrope.traces import read_traces
from experiment.display import Display
from experiment.preflight import preflight
from experiment.results import Taught
from experiment.settings import ExperimentConfig, load
from experiment.stages import Stage
from experiment.steps import Steps
from workflows.pipeline import clean_teacher, defend


def run(config: ExperimentConfig, console: Console) -> list[Taught]:
    """The undefended teacher first, then one result for each choice of defense."""
    preflight(config)
    with Display(console) as display:
        steps = Steps(config, display)
        clean = clean_teacher(config, steps)
        return [clean, *(defend(config, steps, choice, clean) for choice in config.defenses)]


def accuracy(stage: Stage) -> float:
    traces = read_traces(stage.path)
    return sum(trace.correct for trace in traces) / len(traces)


def checkpoint(taught: Taught) -> Path | None:
    """The exported teacher, for a defense that changes weights."""
    return taught.heads[-1].path / "teacher" if taught.heads else None


def main(name: str, overrides: list[str]) -> None:
    """What `azeotrope defend` runs."""
    console = Console()
    table = Table("defense", "strength", "greedy", "sampled", "checkpoint")
    for item in run(load(name, overrides), console):
        place = checkpoint(item)
        table.add_row(
            item.label,
            f"{item.strength:g}",
            f"{accuracy(item.greedy):.3f}",
            f"{accuracy(item.sampled):.3f}",
            str(place) if place else "-",
        )
    console.print(table)
    session.stop()
