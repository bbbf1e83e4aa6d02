"""Let an experiment's teacher, or any checkpoint, write traces to Parquet files.

azeotrope generate pocket_demo
azeotrope generate pocket_demo teacher=path/to/checkpoint traces=5000
"""

from pathlib import Path

from rich.console import Console

from actors import session
from experiment.display import Display
from experiment.plan import ProblemRange, TraceRequest
from experiment.preflight import preflight
from experiment.settings import ExperimentConfig, load
from experiment.steps import Steps


def run(config: ExperimentConfig, console: Console) -> Path:
    """Make `config.traces` traces of the train split; returns the folder of Parquet files.

    Raises:
        ConfigError: if the run would fail later.
        WorkerError: if a worker met bad data or a full disk.
    """
    # Only the teacher is used, so that the other models are not checked.
    preflight(config.model_copy(update={"proxies": (), "students": (), "defenses": ()}), console)
    problems = ProblemRange("train", config.traces)
    with Display(console) as display:
        request = TraceRequest(config.teacher, "teacher", problems, config.sampling)
        [stage] = Steps.of(config, display).traces.generate([request])
    return stage.path


def main(name: str, overrides: list[str]) -> None:
    """What `azeotrope generate` runs."""
    console = Console()
    folder = run(load(name, overrides), console)
    console.print(f"traces: {folder}", soft_wrap=True)
    session.stop()
