"""The outcome of a run: rows of results, curves, examples, and the report made of them."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from azeotrope import __version__, models
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.defenses.base import strength_label
from azeotrope.endings import learned_end
from azeotrope.files import write_json, write_text
from azeotrope.report.completions import ScoredCompletion, repeats, summarise
from azeotrope.report.page import write_report
from azeotrope.report.paired import PAIRED, PairedTest
from azeotrope.report.rows import ResultRow, results_document
from azeotrope.traces import Trace, read_traces
from experiment.cells import Cell
from experiment.plots import plots_of
from experiment.settings import DefenseChoice, ExperimentConfig
from experiment.stages import Stage, describe
from experiment.teachers import TeacherResult

EXAMPLES = 12


def rows_of(
    config: ExperimentConfig,
    clean: TeacherResult,
    base: dict[str, Stage],
    teachers: list[TeacherResult],
    students: dict[Cell, Stage],
) -> list[ResultRow]:
    """The rows of all exams: of teachers, of base students, and of trained students."""
    task = read_traces(clean.greedy.path)[0].problem.split("/")[0]
    tokenizer = models.load_tokenizer(config.teacher)
    rows: list[ResultRow] = []
    for teacher in (clean, *teachers):
        columns = {
            "role": "teacher",
            "model": "teacher",
            "task": task,
            "defense": teacher.label,
            "strength": teacher.strength,
            "settings": _defense_settings(teacher.choice),
        }
        exams = ((teacher.greedy, "greedy"), (teacher.sampled, config.sampling.label))
        for stage, decoding in exams:
            scored = score(read_traces(stage.path), tokenizer)
            rows += _measured(scored, stage.seconds, {**columns, "decoding": decoding})
    for name, stage in base.items():
        columns = {"role": "student", "model": name, "task": task, "strength": 0.0}
        rows += _measured(score(read_traces(stage.path)), stage.seconds, columns)
    choices = {(teacher.label, teacher.strength): teacher.choice for teacher in teachers}
    for cell, stage in sorted(students.items(), key=lambda pair: str(pair[0])):
        columns = {
            "role": "student",
            "model": cell.student.name,
            "task": task,
            "defense": cell.defense,
            "strength": cell.strength,
            "attack": cell.attack,
            "variant": cell.variant,
            "cleanup": cell.cleanup,
            "settings": {
                **_defense_settings(choices.get((cell.defense, cell.strength))),
                **_attack_settings(config, cell),
            },
            "cost": describe(stage, "student.json").get("cost"),
            "traces": cell.traces,
            "seed": cell.seed,
        }
        exam = read_traces(stage.path / "exam.parquet")
        rows += _measured(score(exam), stage.seconds, columns)
    return rows


def _defense_settings(choice: DefenseChoice | None) -> dict[str, Any]:
    return {"defense": list(choice.parts)} if choice else {}


def _attack_settings(config: ExperimentConfig, cell: Cell) -> dict[str, Any]:
    """The settings of an attack and, if there are any, of its clean-ups."""
    parts = cleanups.resolve(config.cleanup_called(cell.cleanup)).parts
    cleaned = {"cleanup": [part.config.dump() for part in parts]} if parts else {}
    return {"attack": config.attack_called(cell.attack, cell.variant), **cleaned}


def score(
    traces: list[Trace], tokenizer: PreTrainedTokenizerBase | None = None
) -> list[ScoredCompletion]:
    """What the statistics need to know of an exam.

    Args:
        tokenizer: counts the tokens of texts that a defense rewrote; such traces have no tokens of
            their own.
    """
    scored = []
    for trace in traces:
        ids: Sequence[int] = trace.completion_ids
        if not ids and trace.text and tokenizer is not None:
            ids = tokenizer(trace.text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
            if trace.finished:
                # As in generated completions, the end of the sequence counts as a token.
                ids = [*ids, learned_end(tokenizer)]
        scored.append(
            ScoredCompletion(
                problem_id=trace.problem,
                correct=trace.correct,
                finished=trace.finished,
                tokens=len(ids),
                repeated=repeats(ids),
            )
        )
    return scored


def _measured(
    scored: list[ScoredCompletion], seconds: float, columns: dict[str, Any]
) -> list[ResultRow]:
    return [
        ResultRow(metric=metric, value=value, n=n, ci95=ci95, seconds=seconds, **columns)
        for metric, (value, n, ci95) in summarise(scored).items()
    ]


def write_results(
    config: ExperimentConfig,
    folder: Path,
    rows: list[ResultRow],
    clean: TeacherResult,
    teachers: list[TeacherResult],
    students: dict[Cell, Stage],
    notes: Sequence[str] = (),
) -> None:
    heads = [(t.label, [describe(head, "head.json") for head in t.heads]) for t in teachers]
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
        PAIRED: [test.dump() for test in _paired_tests(config, clean, teachers)],
        "notes": [
            *(note for label, items in heads for note in _notes(label, items)),
            *strength_notes(teachers),
            *dropped_notes(students),
            *notes,
        ],
    }
    write_json(folder / "results.json", results_document(about, rows))
    write_csv(folder / "results.csv", rows)
    write_json(folder / "curves.json", _curves(teachers, students))
    write_json(folder / "plots.json", [plot.dump() for plot in plots_of(rows, heads)])
    write_json(folder / "examples.json", _examples(clean, teachers))
    write_report(folder)


def write_csv(path: Path, rows: Sequence[ResultRow]) -> None:
    """The rows for spreadsheets; settings and costs, which have parts, are JSON in their cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*ResultRow.model_fields], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = row.dump()
        parts = {name: json.dumps(cells[name]) for name in ("settings", "cost", "ci95")}
        writer.writerow({**cells, **parts})
    write_text(path, text.getvalue())


def strength_notes(teachers: Sequence[TeacherResult]) -> list[str]:
    """Which defenses act with another strength than their settings ask for, one sentence each."""
    return [
        f"{teacher.label}: the settings ask for strength {teacher.choice.strength:g}; the search "
        f"under the utility floor ended with {teacher.strength:g}, which tables show."
        for teacher in teachers
        if teacher.choice is not None
        and teacher.heads
        and not math.isclose(teacher.strength, teacher.choice.strength)
    ]


def dropped_notes(students: Mapping[Cell, Stage]) -> list[str]:
    """Which attackers could not use all of their traces, one sentence for each kind of them."""
    worst: dict[str, tuple[int, int, int]] = {}
    for cell, stage in students.items():
        dropped = describe(stage, "student.json").get("dropped", {})
        empty, too_long = dropped.get("empty", 0), dropped.get("too_long", 0)
        if empty or too_long:
            label = f"student {cell.student.name}, {cell.defense} {cell.attack}, {cell.cleanup}"
            worst[label] = max(worst.get(label, (0, 0, 0)), (empty + too_long, empty, too_long))
    return [
        f"{label}: {total} traces could not be learned from ({empty} empty, {long} too long)."
        for label, (total, empty, long) in worst.items()
    ]


def _paired_tests(
    config: ExperimentConfig, clean: TeacherResult, teachers: list[TeacherResult]
) -> list[PairedTest]:
    """Every defended teacher against the clean one on the problems of the exams."""
    tests = []
    for teacher in teachers:
        exams = (
            ("greedy", clean.greedy, teacher.greedy),
            (config.sampling.label, clean.sampled, teacher.sampled),
        )
        for decoding, before, after in exams:
            tests.append(
                PairedTest.of(
                    {trace.problem: trace.correct for trace in read_traces(before.path)},
                    {trace.problem: trace.correct for trace in read_traces(after.path)},
                    defense=teacher.label,
                    strength=teacher.strength,
                    decoding=decoding,
                )
            )
    return [test for test in tests if test is not None]


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
        if rounds and not any(attempt["accepted"] for attempt in rounds):
            exported = (
                "that of the undefended teacher" if head.get("undefended") else "the one it had"
            )
            notes.append(
                f"{label}: none of {len(rounds)} rounds kept the utility floor, so the head that "
                f"this pass exported is {exported}."
            )
    return notes


def _curves(teachers: list[TeacherResult], students: dict[Cell, Stage]) -> list[dict[str, Any]]:
    curves: list[dict[str, Any]] = []
    for item in teachers:
        for number, head in enumerate(item.heads):
            log = describe(head, "head.json")["log"]
            label = f"{item.label} head, pass {number + 1}"
            curves.append({**_curve(label, "head", log, 0), "group": f"{item.label} head"})
    for cell, stage in sorted(students.items(), key=lambda pair: str(pair[0])):
        # Only one of the two acts: variants belong to attacks that are not cleaned up.
        changes = cell.variant if cell.cleanup == "none" else cell.cleanup
        group = f"{strength_label(cell.defense, cell.strength)} {cell.attack}"
        label = f"{cell.student.name}: {group} {changes} n={cell.traces}"
        log = describe(stage, "student.json")["log"]
        curves.append({**_curve(label, "student", log, cell.seed), "group": group})
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


def _examples(clean: TeacherResult, teachers: list[TeacherResult]) -> list[dict[str, Any]]:
    """The first sampled answers of the clean teacher beside those of each defended one."""
    examples: list[dict[str, Any]] = []
    clean_traces = read_traces(clean.sampled.path)[:EXAMPLES]
    for teacher in teachers:
        defended = {trace.id: trace.text for trace in read_traces(teacher.sampled.path)}
        examples += [
            {
                "question": trace.question,
                "answer": trace.reference,
                "clean": trace.text,
                "defended": defended[trace.id],
                "defense": teacher.label,
            }
            for trace in clean_traces
        ]
    return examples


def link_stages(folder: Path, stages: list[Stage]) -> None:
    """Link the stages of a run, which lie in the shared cache, from its folder."""
    links = folder / "stages"
    links.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        link = links / stage.path.name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(stage.path, links))
