"""Check a configuration and say what a run of it would do, without a network.

azeotrope validate qwen_gpu
azeotrope validate my_model.yaml traces=5000
"""

from rich.console import Console
from rich.table import Table

from azeotrope import packaged
from experiment.preflight import is_here, preflight
from experiment.settings import ExperimentConfig, load
from workflows.pipeline import cells_of

_HUB = "hub: downloaded when the run starts, unless the hub's cache has it"


def run(config: ExperimentConfig) -> Table:
    """Check all that can be checked here, and describe the run.

    Raises:
        ConfigError: if the run would fail.
    """
    preflight(config, convert=False)
    table = Table("what", "which", "where", title=f"{config.name} is valid")
    roles = [("teacher", config.teacher), *(("proxy", name) for name in config.proxies)]
    roles += [(f"student {student.name}", student.model) for student in config.students]
    for role, name in roles:
        table.add_row(role, name, _place_of_model(name))
    table.add_row("task", config.task.name, "here" if config.task.is_local else _HUB)
    for stage, content in stages(config):
        table.add_row(stage, content, "")
    return table


def stages(config: ExperimentConfig) -> list[tuple[str, str]]:
    """Every kind of stage and what it makes, in the order of a run."""
    exams = 2 * config.teacher_problems
    found = [("traces", f"{config.most_traces} of the teacher, and {exams} exam answers")]
    for choice in config.defenses:
        for part in (item for item in choice.resolve() if not item.is_identity):
            does = {
                "weights": f"train a head, {choice.training.refreshes + 1} time(s), and export it",
                "decoding": "adjust every token that is drawn",
                "text": "rewrite finished traces",
            }[part.stage]
            found.append((f"defense {choice.label}", f"{part.config.name}: {does}"))
    taught = cells_of(config)
    untaught = len(config.students)
    if not untaught:
        return [*found, ("students", "none: the teacher is defended and examined, nobody robs it")]
    found.append(("students", f"{len(taught)} to train; {untaught} untaught to compare with"))
    return [*found, ("exams", f"{config.exam_problems} problems for each student")]


def _place_of_model(name: str) -> str:
    if is_here(name):
        return "here"
    if packaged.is_packaged(name):
        return f"to be converted to {packaged.folder_of(name)}"
    return _HUB


def main(name: str, overrides: list[str]) -> None:
    """What `azeotrope validate` runs."""
    console = Console()
    width = None if console.is_terminal else 150
    Console(width=width).print(run(load(name, overrides)))
