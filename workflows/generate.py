"""Let the teacher of an experiment, or any checkpoint, write traces to Parquet.

azeotrope generate pocket_demo
azeotrope generate pocket_demo teacher=path/to/checkpoint traces=5000
"""

from pathlib import Path

from rich.console import Console

from actors import session
from experiment.display import Display
from experiment.preflight import preflight
from experiment.settings import ExperimentConfig, load
from experiment.steps import Request, Steps


def run(config: ExperimentConfig, console: Console) -> Path:
    """Make `config.traces` traces of the train split; returns the folder of Parquet files."""
    # Only the teacher is needed, so nothing is asked of the rest.
    preflight(config.model_copy(update={"proxies": (), "students": (), "defenses": ()}))
    with Display(console) as display:
        request = Request(config.teacher, "teacher", "train", config.traces, config.sampling)
        return Steps(config, display).traces([request])[0].path


def main(name: str, overrides: list[str]) -> None:
    """What `azeotrope generate` runs."""
    console = Console()
    folder = run(load(name, overrides), console)
    console.print(f"traces: {folder}", soft_wrap=True)
    session.stop()
