"""Examine any checkpoint on the experiment's test problems, greedily and sampled.

azeotrope evaluate pocket_demo pocket/teacher
"""

from rich.console import Console
from rich.table import Table

from actors import session
from azeotrope.report.completions import summarise
from azeotrope.traces import read_traces
from experiment.display import Display
from experiment.preflight import preflight
from experiment.results import score
from experiment.settings import ExperimentConfig, load
from experiment.steps import Request, Steps


def run(config: ExperimentConfig, model: str, console: Console) -> Table:
    """Accuracy, end, truncation and repetition rates with their intervals."""
    config = config.model_copy(update={"teacher": model, "proxies": (), "defenses": ()})
    preflight(config)
    table = Table("decoding", "metric", "value", "n", "95 %")
    with Display(console) as display:
        count = config.teacher_problems
        requests = [
            Request(model, "teacher", "test", count, sampling)
            for sampling in (config.greedy, config.sampling)
        ]
        for request, stage in zip(requests, Steps(config, display).traces(requests), strict=True):
            for metric, (value, n, (low, high)) in summarise(
                score(read_traces(stage.path))
            ).items():
                table.add_row(
                    request.sampling.label, metric, f"{value:.3f}", str(n), f"{low:.3f}-{high:.3f}"
                )
    return table


def main(name: str, model: str, overrides: list[str]) -> None:
    """What `azeotrope evaluate` runs."""
    console = Console()
    console.print(run(load(name, overrides), model, console))
    session.stop()
