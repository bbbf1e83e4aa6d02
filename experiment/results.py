"""What a run leaves behind: rows of results, curves, examples, and the report made of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azeotrope import __version__
from azeotrope.files import write_json
from azeotrope.report.page import write_report
from azeotrope.report.statistics import Row, Scored, repeats, results_document, summarise
from azeotrope.traces import Trace, read_traces
from experiment.plots import plots_of
from experiment.settings import DefenseChoice, ExperimentConfig, StudentConfig
from experiment.stages import Stage
from experiment.steps import describe

EXAMPLES = 12


@dataclass(frozen=True)
class Cell:
    """One student to train: on what, how many, cleaned how, with which seed."""

    student: StudentConfig
    defense: str
    strength: float
    attack: str
    cleanup: str
    traces: int
    seed: int


@dataclass(frozen=True)
class Taught:
    """What a defense produced: the traces a thief gets and the teacher's own exams."""

    choice: DefenseChoice | None
    traces: Stage
    greedy: Stage
    sampled: Stage
    heads: tuple[Stage, ...] = ()

    @property
    def label(self) -> str:
        return self.choice.label if self.choice else "none"

    @property
    def checkpoint(self) -> str | None:
        """The exported teacher; None where the weights are the undefended ones."""
        return str(self.heads[-1].path / "teacher") if self.heads else None

    @property
    def strength(self) -> float:
        """The strength in force: for a searched head the one that was accepted last."""
        found = [describe(stage, "head.json") for stage in self.heads]
        if not found:
            return self.choice.strength if self.choice else 0.0
        # Whatever was trained before the undefended head was taken again is gone.
        start = max((i for i, head in enumerate(found) if head.get("undefended")), default=0)
        return max(head["strength"] for head in found[start:])


def rows_of(
    config: ExperimentConfig,
    clean: Taught,
    base: dict[str, Stage],
    taught: list[Taught],
    students: dict[Cell, Stage],
) -> list[Row]:
    task = read_traces(clean.greedy.path)[0].problem.split("/")[0]
    rows: list[Row] = []
    for item in (clean, *taught):
        for stage, decoding in ((item.greedy, "greedy"), (item.sampled, config.sampling.label)):
            shown = {
                "role": "teacher",
                "model": "teacher",
                "defense": item.label,
                "strength": item.strength,
                "attack": "none",
                "cleanup": "none",
                "decoding": decoding,
                "traces": 0,
                "seed": 0,
            }
            rows += _measured(read_traces(stage.path), task, stage.seconds, shown)
    for name, stage in base.items():
        shown = _student_row(name, "none", 0.0, "none", "none", 0, 0)
        rows += _measured(read_traces(stage.path), task, stage.seconds, shown)
    for cell, stage in sorted(students.items(), key=lambda pair: str(pair[0])):
        shown = _student_row(
            cell.student.name,
            cell.defense,
            cell.strength,
            cell.attack,
            cell.cleanup,
            cell.traces,
            cell.seed,
        )
        exam = read_traces(stage.path / "exam.parquet")
        rows += _measured(exam, task, stage.seconds, shown)
    return rows


def _student_row(
    model: str, defense: str, strength: float, attack: str, cleanup: str, traces: int, seed: int
) -> dict[str, Any]:
    return {
        "role": "student",
        "model": model,
        "defense": defense,
        "strength": strength,
        "attack": attack,
        "cleanup": cleanup,
        "decoding": "greedy",
        "traces": traces,
        "seed": seed,
    }


def score(traces: list[Trace]) -> list[Scored]:
    """What the statistics need to know of an exam."""
    return [
        Scored(
            problem_id=trace.problem,
            correct=trace.correct,
            finished=trace.finished,
            tokens=len(trace.completion_ids),
            repeated=repeats(trace.completion_ids),
        )
        for trace in traces
    ]


def _measured(traces: list[Trace], task: str, seconds: float, shown: dict[str, Any]) -> list[Row]:
    return [
        Row(task=task, metric=metric, value=value, n=n, ci95=ci95, seconds=seconds, **shown)
        for metric, (value, n, ci95) in summarise(score(traces)).items()
    ]


def write_results(
    config: ExperimentConfig,
    folder: Path,
    rows: list[Row],
    clean: Taught,
    taught: list[Taught],
    students: dict[Cell, Stage],
    notes: Sequence[str] = (),
) -> None:
    heads = [(t.label, [describe(head, "head.json") for head in t.heads]) for t in taught]
    about = {
        "name": config.name,
        "azeotrope": __version__,
        "traces": config.traces,
        "seeds": list(config.seeds),
        "teacher": config.teacher,
        "task": config.task.dump(),
        "defenses": [
            {"defense": label, "heads": [item["rounds"] for item in items]}
            for label, items in heads
        ],
        "notes": [*(note for label, items in heads for note in _notes(label, items)), *notes],
    }
    write_json(folder / "results.json", results_document(about, rows))
    write_json(folder / "curves.json", _curves(taught, students))
    write_json(folder / "plots.json", [plot.dump() for plot in plots_of(rows, heads)])
    write_json(folder / "examples.json", _examples(clean, taught))
    write_report(folder)


def _notes(label: str, heads: list[dict[str, Any]]) -> list[str]:
    """What a reader must know of a head search before believing its numbers."""
    notes = []
    for head in heads:
        clean, rounds = head["clean"], head["rounds"]
        missed = " and ".join(name for name, share in (clean or {}).items() if share == 0)
        if missed:
            notes.append(
                f"{label}: the undefended teacher solved none of the held-out problems of the "
                f"utility floor ({missed}), so the floor asked nothing of the defended one there."
            )
        if rounds and not any(item["accepted"] for item in rounds):
            kept = "that of the undefended teacher" if head.get("undefended") else "the one it had"
            notes.append(
                f"{label}: none of {len(rounds)} rounds kept the utility floor, so the head that "
                f"this pass exported is {kept}."
            )
    return notes


def _curves(taught: list[Taught], students: dict[Cell, Stage]) -> list[dict[str, Any]]:
    curves: list[dict[str, Any]] = []
    for item in taught:
        for number, head in enumerate(item.heads):
            log = describe(head, "head.json")["log"]
            label = f"{item.label} head, pass {number + 1}"
            curves.append(_curve(label, "head", log, 0))
    for cell, stage in sorted(students.items(), key=lambda pair: str(pair[0])):
        what = f"{cell.student.name}: {cell.defense} {cell.attack} {cell.cleanup} n={cell.traces}"
        curves.append(_curve(what, "student", describe(stage, "student.json")["log"], cell.seed))
    return curves


def _curve(label: str, kind: str, log: list[list[float]], seed: int) -> dict[str, Any]:
    return {
        "label": label,
        "kind": kind,
        # Rounds of a search each start at step 1; what is plotted is the running number.
        "x": list(range(1, len(log) + 1)) if kind == "head" else [step for step, _ in log],
        "y": [loss for _, loss in log],
        "seed": seed,
    }


def _examples(clean: Taught, taught: list[Taught]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    before = read_traces(clean.sampled.path)[:EXAMPLES]
    for item in taught:
        after = {trace.id: trace for trace in read_traces(item.sampled.path)}
        for trace in before:
            other = after[trace.id]
            shown.append(
                {
                    "question": trace.question,
                    "answer": trace.reference,
                    "clean": trace.text,
                    "defended": other.text,
                    "defense": item.label,
                }
            )
    return shown


def link_stages(folder: Path, stages: list[Stage]) -> None:
    """Links from the run folder to its stages in the shared cache."""
    links = folder / "stages"
    links.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        link = links / stage.path.name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(stage.path, links))
