"""Examine any checkpoint on the experiment's test problems, with greedy and random decoding.

azeotrope evaluate pocket_demo pocket/teacher
"""

from rich.console import Console
from rich.table import Table

from actors import session
from azeotrope.report.completions import summarise
from azeotrope.traces import read_traces
from experiment.display import Display
from experiment.plan import ProblemRange, TraceRequest
from experiment.preflight import preflight
from experiment.results import score
from experiment.settings import ExperimentConfig, load
from experiment.steps import Steps


def run(config: ExperimentConfig, model: str, console: Console) -> Table:
    """Accuracy, and the rates of finished, truncated and repetitive answers, with intervals.

    Raises:
        ConfigError: if the run would fail later.
        WorkerError: if a worker met bad data or a full disk.
    """
    config = config.model_copy(update={"teacher": model, "proxies": (), "defenses": ()})
    preflight(config, console)
    problems = ProblemRange("test", config.teacher_problems)
    requests = [
        TraceRequest(model, "teacher", problems, sampling)
        for sampling in (config.greedy, config.sampling)
    ]
    with Display(console) as display:
        stages = Steps.of(config, display).traces.generate(requests)
    table = Table("decoding", "metric", "value", "n", "95 %")
    for request, stage in zip(requests, stages, strict=True):
        decoding = request.sampling.label
        for metric, (value, n, (low, high)) in summarise(score(read_traces(stage.path))).items():
            table.add_row(decoding, metric, f"{value:.3f}", str(n), f"{low:.3f}-{high:.3f}")
    return table


def main(name: str, model: str, overrides: list[str]) -> None:
    """What `azeotrope evaluate` runs."""
    console = Console()
    console.print(run(load(name, overrides), model, console))
    session.stop()
