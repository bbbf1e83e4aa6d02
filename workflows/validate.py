"""Check a configuration and say what a run of it would do, without a network.

azeotrope validate qwen_gpu
azeotrope validate my_model.yaml traces=5000
"""

from rich.table import Table

from azeotrope import packaged
from experiment.cells import cells_of
from experiment.plan import attacked_problems, head_passes, student_exam, teacher_exam
from experiment.preflight import is_local_model, preflight
from experiment.settings import DefenseChoice, ExperimentConfig, load
from experiment.terminal import wide_console

_HUB = "hub: downloaded when the run starts, unless the hub's cache has it"


def run(config: ExperimentConfig) -> Table:
    """Check everything that can be checked on this machine, and describe the run.

    Raises:
        ConfigError: if the run would fail.
    """
    preflight(config, convert=False)
    table = Table("what", "which", "where", title=f"{config.name} is valid")
    roles = [("teacher", config.teacher), *(("proxy", name) for name in config.proxies)]
    roles += [(f"student {student.name}", student.model) for student in config.students]
    for role, name in roles:
        table.add_row(role, name, _location(name))
    table.add_row("task", config.task.name, "here" if config.task.is_local else _HUB)
    for stage, content in stages(config):
        table.add_row(stage, content, "")
    return table


def stages(config: ExperimentConfig) -> list[tuple[str, str]]:
    """Every kind of stage and what it makes, in the order of a run."""
    traces, exams = attacked_problems(config).count, 2 * teacher_exam(config).count
    lines = [("traces", f"{traces} of the teacher, and {exams} exam answers")]
    for choice in config.defenses:
        lines += [(f"defense {choice.label}", does) for does in _actions(config, choice)]
    if not config.students:
        return [
            *lines,
            ("students", "none: the teacher is defended and examined, and not attacked"),
        ]
    trained, untrained = len(cells_of(config)), len(config.students)
    return [
        *lines,
        ("students", f"{trained} to train; {untrained} untrained to compare with"),
        ("exams", f"{student_exam(config).count} problems per student"),
    ]


def _actions(config: ExperimentConfig, choice: DefenseChoice) -> list[str]:
    """What each defense of a composition does, in the order of the settings."""
    passes = len(head_passes(config, choice))
    actions = {
        "weights": f"train a head, {passes} time(s), and export it",
        "decoding": "adjust every token that is drawn",
        "text": "rewrite finished traces",
    }
    acting = (part for part in choice.resolve() if not part.is_identity)
    return [f"{part.config.name}: {actions[part.stage]}" for part in acting]


def _location(name: str) -> str:
    if is_local_model(name):
        return "here"
    if packaged.is_packaged(name):
        return f"to be converted to {packaged.folder_of(name)}"
    return _HUB


def main(name: str, overrides: list[str]) -> None:
    """What `azeotrope validate` runs."""
    wide_console().print(run(load(name, overrides)))
