"""Result rows -> lines of the compact tables, and the headline numbers of each line."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from azeotrope.report.statistics import (
    UNDEFINED,
    Accuracy,
    Curve,
    Estimate,
    Row,
    gain_removed,
    mean_accuracy,
    price_multiplier,
    utility_kept,
)

DEGENERACY = ("eos_rate", "repetition_rate", "truncation_rate", "tokens")


BASELINE = "answers_only"


CERTAIN = Estimate(1.0, 1.0, 1.0)


class Line(NamedTuple):
    """What one line of the compact table is about: a student and what it learned from."""

    task: str
    model: str
    defense: str
    strength: float | None
    attack: str
    cleanup: str

    @property
    def stolen(self) -> bool:
        """Whether the student was trained on the teacher's traces."""
        return self.attack not in {"none", "sft_only"}

    @property
    def label(self) -> str:
        """What the student learned from, in a few words."""
        if self.attack == "none":
            return "base student"
        if self.attack == "sft_only":
            return "ground truth only"
        asked = "clean traces" if self.attack == "text_sft" else "clean logits"
        name = asked if self.defense == "none" else self.defense
        if self.strength is not None and self.defense != "none":
            name += f" ({self.strength:g})"
        if self.attack != "text_sft":
            name += f", {self.attack}"
        if self.cleanup == "none":
            return name
        # A clean-up acts on text; the variant of an attack on logits stands in the same column.
        return (
            f"{name}, after {self.cleanup}"
            if self.attack == "text_sft"
            else f"{name}, {self.cleanup}"
        )


@dataclass(frozen=True)
class Headline:
    """The three headline numbers of one student trained on defended traces."""

    line: Line
    traces: int
    seeds: int
    student: Estimate
    clean_student: Estimate
    base_student: Estimate
    sft_student: Estimate
    """Trained on the ground truth alone: what the thief has without asking anybody."""
    utility_kept: Estimate
    gain_removed: Estimate
    price_multiplier: Estimate


class Index:
    """Accuracies by line, budget and seed, and by teacher."""

    def __init__(self, rows: Sequence[Row], traces: int | None = None) -> None:
        accuracies = [row for row in rows if row.metric == "accuracy"]
        students = [row for row in accuracies if row.role == "student"]
        decodings = {row.decoding for row in students}
        decoding = "greedy" if "greedy" in decodings or not decodings else min(decodings)
        by_seed: dict[Line, dict[int, dict[int, Accuracy]]] = defaultdict(lambda: defaultdict(dict))
        for row in students:
            if row.decoding == decoding:
                by_seed[line_of(row)][row.traces][row.seed] = Accuracy(row.value, row.n)
        self.curves: dict[Line, dict[int, list[Accuracy]]] = {
            line: {count: list(seeds.values()) for count, seeds in sorted(budgets.items())}
            for line, budgets in by_seed.items()
        }
        self.teachers: dict[tuple[str, str, float | None, str], list[Accuracy]] = defaultdict(list)
        for row in accuracies:
            if row.role == "teacher":
                key = (row.task, row.defense, row.strength, row.decoding)
                self.teachers[key].append(Accuracy(row.value, row.n))
        self.traces = _main_budget(self.curves) if traces is None else traces

    def lines(self) -> list[Line]:
        """Base, ground truth, clean traces, then the defenses; clean-ups after what they clean."""
        models = list(dict.fromkeys(line.model for line in self.curves))
        defenses = list(dict.fromkeys(line.defense for line in self.curves))

        def order(line: Line) -> tuple[Any, ...]:
            rank = {"none": 0, "sft_only": 1}.get(line.attack, 2)
            position = defenses.index(line.defense)
            defended = (line.defense != "none", line.defense != BASELINE, position)
            cleaned = (line.attack, line.cleanup != "none", *_natural(line.cleanup))
            return (
                line.task,
                models.index(line.model),
                rank,
                *defended,
                line.strength or 0.0,
                *cleaned,
            )

        return sorted(self.curves, key=order)

    def budget(self, line: Line) -> int:
        """The main budget, or the line's own largest where that was not measured."""
        budgets = self.curves[line]
        return self.traces if self.traces in budgets else max(budgets)

    def measured(self, line: Line) -> list[Accuracy]:
        return self.curves[line][self.budget(line)]

    def find(self, line: Line, *, attack: str | None = None) -> Line | None:
        """The undefended, uncleaned line of the same student; None if nobody measured it."""
        wanted = attack or line.attack
        for other in self.curves:
            if (other.task, other.model, other.attack) == (line.task, line.model, wanted) and (
                other.defense == "none" and other.cleanup == "none"
            ):
                return other
        return None

    def teacher(self, line: Line, defense: str, *, greedy: bool) -> list[Accuracy]:
        strengths = {key[2] for key in self.teachers if key[:2] == (line.task, defense)}
        strength = line.strength if line.strength in strengths else next(iter(strengths), None)
        if len(strengths) > 1 and line.strength not in strengths:
            return []
        for key in sorted(self.teachers, key=lambda item: item[3]):
            if key[:3] == (line.task, defense, strength) and (key[3] == "greedy") == greedy:
                return self.teachers[key]
        # Hiding the reasoning changes no answer, so that teacher need not be measured again.
        return self.teacher(line, "none", greedy=greedy) if defense == BASELINE else []


def _natural(name: str) -> tuple[str, float]:
    """`pairs=8` before `pairs=16`."""
    head, found, number = name.partition("=")
    try:
        return head, float(number) if found else 0.0
    except ValueError:
        return name, 0.0


def line_of(row: Row) -> Line:
    """The line of the compact table that a row belongs to."""
    return Line(row.task, row.model, row.defense, row.strength, row.attack, row.cleanup)


def _main_budget(curves: Mapping[Line, Mapping[int, Sequence[Accuracy]]]) -> int:
    """The budget that most lines share; the largest such."""
    counts: dict[int, int] = defaultdict(int)
    for line, budgets in curves.items():
        for count in budgets:
            counts[count] += line.stolen
    return max(counts, key=lambda count: (counts[count], count), default=0)


def headline(rows: Sequence[Row], traces: int | None = None) -> list[Headline]:
    """The headline numbers of every student that learned from defended traces.

    Clean-ups are held against the clean student without one: what the defense still removes
    once the thief has done his best.

    Args:
        traces: the budget to report; the largest that most lines have if it is not given.
    """
    index = Index(rows, traces)
    chosen = [line for line in index.lines() if line.stolen and line.defense != "none"]
    return [_headline(index, line) for line in chosen]


def _headline(index: Index, line: Line) -> Headline:
    budget, measured = index.budget(line), index.measured(line)
    clean_line, base_line = index.find(line), index.find(line, attack="none")
    sft_line = index.find(line, attack="sft_only")
    clean_curve = {} if clean_line is None else index.curves[clean_line]
    clean = clean_curve.get(budget, [])
    base = [] if base_line is None else index.measured(base_line)
    return Headline(
        line=line,
        traces=budget,
        seeds=len(measured),
        student=mean_accuracy(measured),
        clean_student=mean_accuracy(clean) if clean else UNDEFINED,
        base_student=mean_accuracy(base) if base else UNDEFINED,
        sft_student=mean_accuracy(index.measured(sft_line)) if sft_line else UNDEFINED,
        utility_kept=_utility(index, line),
        gain_removed=gain_removed(clean, measured, base) if clean and base else UNDEFINED,
        price_multiplier=_price(clean_curve, index.curves[line]),
    )


def _utility(index: Index, line: Line) -> Estimate:
    for greedy in (True, False):
        clean = index.teacher(line, "none", greedy=greedy)
        defended = index.teacher(line, line.defense, greedy=greedy)
        if clean and defended:
            return CERTAIN if defended is clean else utility_kept(clean, defended)
    return CERTAIN if line.defense == BASELINE else UNDEFINED


def _price(clean: Curve, defended: Curve) -> Estimate:
    return price_multiplier(bought(clean), bought(defended))


def bought(curve: Curve) -> dict[int, Sequence[Accuracy]]:
    """The part of a curve that a logarithmic axis can hold."""
    return {count: measured for count, measured in curve.items() if count}


def percent(estimate: Estimate) -> str:
    """`51.0 % [46.6, 55.4]`, or a dash where there is nothing to say."""
    if not estimate.defined:
        return "-"
    low, high = (_bounded(100 * end, ".1f") for end in (estimate.lo, estimate.hi))
    return f"{100 * estimate.value:.1f} % [{low}, {high}]"


def times(estimate: Estimate) -> str:
    """`2.0 times [1.7, 2.4]`, or `at least 16.0 times`, or a dash."""
    if not estimate.defined:
        return "-"
    word = {"at_least": "at least ", "at_most": "at most "}.get(estimate.bound, "")
    low, high = (_bounded(end, ".2g") for end in (estimate.lo, estimate.hi))
    return f"{word}{estimate.value:.2g} times [{low}, {high}]"


def _bounded(value: float, form: str) -> str:
    if math.isinf(value):
        return "no limit"
    return format(value, form)


def result_table(rows: Sequence[Row], traces: int | None = None) -> list[list[str]]:
    """The compact table, its header first: one line a student, defense, attack and clean-up.

    Student accuracy is the mean over seeds; its interval covers seeds and problems.
    """
    index = Index(rows, traces)
    removed = {item.line: item.gain_removed for item in headline(rows, traces)}
    lines = index.lines()
    several_tasks = len({line.task for line in lines}) > 1
    header = ["student", "defense", "attack", "clean-up", "traces", "teacher greedy"]
    header += ["teacher sampled", "student accuracy", "seeds", "gain removed"]
    table = [["task", *header] if several_tasks else header]
    for line in lines:
        cells = _table_line(index, line, removed.get(line, UNDEFINED))
        table.append([line.task, *cells] if several_tasks else cells)
    return table


def _table_line(index: Index, line: Line, removed: Estimate) -> list[str]:
    strength = "" if line.strength is None else f" ({line.strength:g})"
    measured = index.measured(line)
    teachers = [_teacher_cell(index, line, greedy=greedy) for greedy in (True, False)]
    return [
        line.model,
        f"{line.defense}{strength}",
        line.attack,
        line.cleanup,
        str(index.budget(line)) if line.attack != "none" else "0",
        *teachers,
        percent(mean_accuracy(measured)),
        str(len(measured)),
        percent(removed),
    ]


def _teacher_cell(index: Index, line: Line, *, greedy: bool) -> str:
    if not line.stolen:
        return "-"
    measured = index.teacher(line, line.defense, greedy=greedy)
    return f"{100 * mean_accuracy(measured).value:.1f} %" if measured else "-"


def teacher_table(rows: Sequence[Row]) -> list[list[str]]:
    """The teacher's own accuracy, its header first: one line a defense and decoding."""
    table = [["task", "defense", "decoding", "problems", "accuracy"]]
    for row in teacher_rows(rows):
        shown = percent(Estimate(row.value, *row.ci95))
        table.append([row.task, defense_cell(row), row.decoding, str(row.n), shown])
    return table


def teacher_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.role == "teacher" and row.metric == "accuracy"]


def defense_cell(row: Row) -> str:
    bare = row.strength is None or row.defense == "none"
    return row.defense if bare else f"{row.defense} ({row.strength:g})"


def degeneracy_table(rows: Sequence[Row], traces: int | None = None) -> list[list[str]]:
    """Means over seeds of how completions end, header first; empty if nobody measured it."""
    index = Index(rows, traces)
    found: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.metric not in DEGENERACY:
            continue
        line = line_of(row)
        if row.role == "student" and line in index.curves and row.traces != index.budget(line):
            continue
        strength = "" if row.strength is None else f" ({row.strength:g})"
        attack = "-" if row.role == "teacher" else row.attack
        key = (row.model, f"{row.defense}{strength}", attack, row.cleanup, row.decoding)
        found[key][row.metric].append(row.value)
    if not found:
        return []
    header = ["model", "defense", "attack", "clean-up", "decoding", "ended", "repeated"]
    table = [[*header, "cut off", "tokens"]]
    return table + [[*key, *_rates(values)] for key, values in found.items()]


def _rates(values: Mapping[str, Sequence[float]]) -> list[str]:
    cells = []
    for metric in DEGENERACY:
        numbers = values.get(metric, [])
        if not numbers:
            cells.append("-")
            continue
        mean = sum(numbers) / len(numbers)
        cells.append(f"{mean:.1f}" if metric == "tokens" else f"{100 * mean:.1f} %")
    return cells


def other_table(rows: Sequence[Row]) -> list[list[str]]:
    """Every row of a metric that the other tables leave out, such as a watermark's detection."""
    rest = [row for row in rows if row.metric not in {"accuracy", *DEGENERACY}]
    if not rest:
        return []
    header = ["role", "model", "defense", "attack", "clean-up", "traces", "metric", "value"]
    table = [[*header, "interval", "n", "seed"]]
    for row in rest:
        cells = [row.role, row.model, row.defense, row.attack, row.cleanup, str(row.traces)]
        cells += [row.metric, f"{row.value:.4g}", f"[{row.ci95[0]:.4g}, {row.ci95[1]:.4g}]"]
        table.append([*cells, str(row.n), str(row.seed)])
    return table
