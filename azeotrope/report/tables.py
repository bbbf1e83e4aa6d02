"""Result rows -> tables of text, the header first, for the page and the terminal."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from azeotrope.defenses.base import strength_label
from azeotrope.report.completions import DEGENERACY
from azeotrope.report.headlines import Headline, best_attacks, headline
from azeotrope.report.intervals import UNDEFINED, Estimate, mean_accuracy
from azeotrope.report.lines import Index, Line, line_of
from azeotrope.report.rows import ResultRow

PROBLEMS_ONLY = "with one seed, intervals cover the choice of problems only"


def percent(estimate: Estimate) -> str:
    """`51.0 % [46.6, 55.4]`, a dash if the estimate is undefined, or that nothing limits it."""
    if not estimate.defined:
        return "-"
    if math.isinf(estimate.lo) and math.isinf(estimate.hi):
        # The clean student may have gained nothing at all, so that any share of it is possible.
        return "not determined"
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


def result_table(rows: Sequence[ResultRow], traces: int | None = None) -> list[list[str]]:
    """The compact table, its header first: one line per student, defense, attack and clean-up.

    Student accuracy is the mean over seeds; its interval covers seeds and problems, or problems
    alone if there is one seed.
    """
    index = Index(rows, traces)
    removed = {item.line: item.gain_removed for item in headline(rows, traces)}
    lines = index.lines()
    header = ["task", "student", "defense", "attack", "variant", "clean-up", "traces"]
    header += ["teacher greedy", "teacher sampled", "student accuracy", "seeds", "gain removed"]
    table = [header]
    table += [_table_line(index, line, removed.get(line, UNDEFINED)) for line in lines]
    optional = {
        "task": len({line.task for line in lines}) > 1,
        "variant": any(line.variant != "none" for line in lines),
    }
    return without(table, {column for column, is_needed in optional.items() if not is_needed})


def narrow_result_table(
    rows: Sequence[ResultRow], traces: int | None = None
) -> tuple[list[list[str]], str]:
    """The compact table for narrow places, and a caption with the columns that it leaves out.

    The teacher's accuracy is left out too; `teacher_table` has it.
    """
    index = Index(rows, traces)
    removed = {item.line: item.gain_removed for item in headline(rows, traces)}
    lines = index.lines()
    table = [["task", "student", "learned from", "accuracy", "gain removed"]]
    for line in lines:
        budget = index.budget(line)
        is_main = line.attack == "none" or budget == index.traces
        label = line.label if is_main else f"{line.label}, {budget} traces"
        accuracy = percent(mean_accuracy(index.measured(line)))
        gain = percent(removed.get(line, UNDEFINED))
        table.append([line.task, line.model, label, accuracy, gain])
    constant = {
        column
        for column, values in (
            ("task", {line.task for line in lines}),
            ("student", {line.model for line in lines}),
        )
        if len(values) == 1
    }
    seeds = [len(index.measured(line)) for line in lines if line.stolen] or [1]
    spread = str(max(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    caption = f"{index.traces} traces; seeds per student: {spread}"
    if min(seeds) == 1:
        caption += f"; {PROBLEMS_ONLY}"
    if "student" in constant and lines:
        caption = f"student {lines[0].model}; {caption}"
    return without(table, constant), caption


def without(table: Sequence[Sequence[str]], columns: set[str]) -> list[list[str]]:
    """A table without some of its columns, which are named by their header."""
    kept = [position for position, name in enumerate(table[0]) if name not in columns]
    return [[line[position] for position in kept] for line in table]


def _table_line(index: Index, line: Line, removed: Estimate) -> list[str]:
    measured = index.measured(line)
    teachers = [_teacher_cell(index, line, greedy=greedy) for greedy in (True, False)]
    return [
        line.task,
        line.model,
        line.defense_label,
        line.attack,
        line.variant,
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


def best_table(headlines: Sequence[Headline]) -> list[list[str]]:
    """The attacker's best result on every student and defense, beside the naive attack's."""
    table = [["task", "student", "defense", "best attack", "student accuracy", "gain removed"]]
    table[0] += ["naive attack", "naive accuracy", "naive gain removed"]
    for attack in best_attacks(headlines):
        best, naive = attack.best, attack.naive
        cells = [best.line.task, best.line.model, best.line.defense_label, best.line.attack_label]
        cells += [percent(best.student), percent(best.gain_removed)]
        if naive is None:
            cells += ["-", "-", "-"]
        elif naive is best:
            cells += ["the same", "-", "-"]
        else:
            cells += [naive.line.attack_label, percent(naive.student), percent(naive.gain_removed)]
        table.append(cells)
    several_tasks = len({line[0] for line in table[1:]}) > 1
    return without(table, set() if several_tasks else {"task"})


def headline_table(headlines: Sequence[Headline]) -> list[list[str]]:
    """The three headline numbers of every student that learned from defended traces."""
    table = [["task", "student", "learned from", "traces", "utility kept", "gain removed"]]
    table[0].append("price multiplier")
    for item in headlines:
        cells = [item.line.task, item.line.model, item.line.label, str(item.traces)]
        cells += [percent(item.utility_kept), percent(item.gain_removed)]
        table.append([*cells, times(item.price_multiplier)])
    several_tasks = len({item.line.task for item in headlines}) > 1
    return without(table, set() if several_tasks else {"task"})


def teacher_table(rows: Sequence[ResultRow]) -> list[list[str]]:
    """The teacher's own accuracy, its header first: one line per defense and decoding."""
    table = [["task", "defense", "decoding", "problems", "accuracy"]]
    for row in teacher_rows(rows):
        accuracy = percent(Estimate(row.value, *row.ci95))
        table.append([row.task, defense_cell(row), row.decoding, str(row.n), accuracy])
    return table


def teacher_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows that hold the accuracy of a teacher."""
    return [row for row in rows if row.role == "teacher" and row.metric == "accuracy"]


def defense_cell(row: ResultRow) -> str:
    """The defense of a row with its strength."""
    return strength_label(row.defense, row.strength)


def degeneracy_table(rows: Sequence[ResultRow], traces: int | None = None) -> list[list[str]]:
    """Means over seeds of how completions end, header first; empty if there are no such rows."""
    index = Index(rows, traces)
    groups: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.metric not in DEGENERACY:
            continue
        line = line_of(row)
        if row.role == "student" and line in index.curves and row.traces != index.budget(line):
            continue
        attack = "-" if row.role == "teacher" else row.attack
        key = (row.model, line.defense_label, attack, row.variant, row.cleanup, row.decoding)
        groups[key][row.metric].append(row.value)
    if not groups:
        return []
    header = ["model", "defense", "attack", "variant", "clean-up", "decoding", "ended", "repeated"]
    table = [[*header, "cut off", "tokens"]]
    table += [[*key, *_rates(values)] for key, values in groups.items()]
    has_variants = any(row.variant != "none" for row in rows)
    return without(table, set() if has_variants else {"variant"})


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


def other_table(rows: Sequence[ResultRow]) -> list[list[str]]:
    """Every row of a metric that no other table shows, such as a watermark's detection."""
    rest = [row for row in rows if row.metric not in {"accuracy", *DEGENERACY}]
    if not rest:
        return []
    header = ["role", "model", "defense", "attack", "variant", "clean-up", "traces", "metric"]
    table = [[*header, "value", "interval", "n", "seed"]]
    for row in rest:
        cells = [row.role, row.model, defense_cell(row), row.attack, row.variant, row.cleanup]
        cells += [str(row.traces), row.metric, f"{row.value:.4g}"]
        cells += [f"[{row.ci95[0]:.4g}, {row.ci95[1]:.4g}]", str(row.n), str(row.seed)]
        table.append(cells)
    has_variants = any(row.variant != "none" for row in rest)
    return without(table, set() if has_variants else {"variant"})
