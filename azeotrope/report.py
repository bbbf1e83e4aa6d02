"""`results.json` -> the compact table, the summary in words, the figures and one HTML page.

The page needs nothing from outside its own file.
"""

import base64
import difflib
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter
from pydantic import ValidationError

from azeotrope.config import C, Config
from azeotrope.evaluation import (
    UNDEFINED,
    Accuracy,
    Curve,
    Estimate,
    Row,
    gain_removed,
    mean_accuracy,
    price_multiplier,
    read_document,
    utility_kept,
)

TEMPLATE = "report.html.jinja"
EXAMPLES = 12
DEGENERACY = ("eos_rate", "repetition_rate", "truncation_rate", "tokens")
BASELINE = "answers_only"
CERTAIN = Estimate(1.0, 1.0, 1.0)
# Okabe and Ito's palette, which stays apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
GREY = "#6b7280"


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
        name = "clean traces" if self.defense == "none" else self.defense
        if self.strength is not None and self.defense != "none":
            name += f" ({self.strength:g})"
        if self.attack != "text_sft":
            name += f", {self.attack}"
        return name if self.cleanup == "none" else f"{name}, after {self.cleanup}"


@dataclass(frozen=True)
class Headline:
    """The three headline numbers of one student trained on defended traces."""

    line: Line
    traces: int
    seeds: int
    student: Estimate
    clean_student: Estimate
    base_student: Estimate
    utility_kept: Estimate
    gain_removed: Estimate
    price_multiplier: Estimate


class LossCurve(Config):
    """One entry of `curves.json`; `x` counts steps and `y` is nats a token."""

    label: str
    kind: Literal["student", "head"]
    x: list[float]
    y: list[float]
    seed: int


class Example(Config):
    """One entry of `examples.json`: a question with its clean and its defended trace."""

    question: str
    answer: str
    clean: str
    defended: str
    defense: str


class Piece(NamedTuple):
    """A stretch of text and whether the other text lacks it."""

    text: str
    changed: bool


class _Index:
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
            cleaned = (line.attack, line.cleanup != "none", line.cleanup)
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
    index = _Index(rows, traces)
    chosen = [line for line in index.lines() if line.stolen and line.defense != "none"]
    return [_headline(index, line) for line in chosen]


def _headline(index: _Index, line: Line) -> Headline:
    budget, measured = index.budget(line), index.measured(line)
    clean_line, base_line = index.find(line), index.find(line, attack="none")
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
        utility_kept=_utility(index, line),
        gain_removed=gain_removed(clean, measured, base) if clean and base else UNDEFINED,
        price_multiplier=_price(clean_curve, index.curves[line]),
    )


def _utility(index: _Index, line: Line) -> Estimate:
    for greedy in (True, False):
        clean = index.teacher(line, "none", greedy=greedy)
        defended = index.teacher(line, line.defense, greedy=greedy)
        if clean and defended:
            return CERTAIN if defended is clean else utility_kept(clean, defended)
    return CERTAIN if line.defense == BASELINE else UNDEFINED


def _price(clean: Curve, defended: Curve) -> Estimate:
    return price_multiplier(_bought(clean), _bought(defended))


def _bought(curve: Curve) -> dict[int, Sequence[Accuracy]]:
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
    index = _Index(rows, traces)
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


def _table_line(index: _Index, line: Line, removed: Estimate) -> list[str]:
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


def _teacher_cell(index: _Index, line: Line, *, greedy: bool) -> str:
    if not line.stolen:
        return "-"
    measured = index.teacher(line, line.defense, greedy=greedy)
    return f"{100 * mean_accuracy(measured).value:.1f} %" if measured else "-"


def teacher_table(rows: Sequence[Row]) -> list[list[str]]:
    """The teacher's own accuracy, its header first: one line a defense and decoding."""
    table = [["task", "defense", "decoding", "problems", "accuracy"]]
    for row in _teacher_rows(rows):
        shown = percent(Estimate(row.value, *row.ci95))
        table.append([row.task, _defense_cell(row), row.decoding, str(row.n), shown])
    return table


def _teacher_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.role == "teacher" and row.metric == "accuracy"]


def _defense_cell(row: Row) -> str:
    bare = row.strength is None or row.defense == "none"
    return row.defense if bare else f"{row.defense} ({row.strength:g})"


def _teacher_words(rows: Sequence[Row]) -> list[str]:
    """What a run without students shows, and what it cannot show."""
    teachers = _teacher_rows(rows)
    if not teachers:
        return []
    clean = {(row.task, row.decoding): row for row in teachers if row.defense == "none"}
    sentences = [
        "No student was trained in this run, so it does not show what a defense takes from a "
        "thief; it shows what the teacher itself can still do."
    ]
    for row in teachers:
        right = f"{round(row.value * row.n)} of {row.n} problems"
        shown = f"{row.decoding}: {right}, {percent(Estimate(row.value, *row.ci95))}"
        if row.defense == "none":
            sentences.append(f"The undefended teacher solves, {shown}.")
            continue
        words = f"With {_defense_cell(row)} it solves, {shown}."
        if row.strength == 0:
            words += " At strength 0 it is the undefended teacher."
        before = clean.get((row.task, row.decoding))
        if before is not None:
            words += f" {_kept_words(before, row)}"
        sentences.append(words)
    return sentences


def _kept_words(clean: Row, defended: Row) -> str:
    kept = utility_kept([Accuracy(clean.value, clean.n)], [Accuracy(defended.value, defended.n)])
    if not kept.defined:
        return "The undefended one solves none, so what was kept cannot be said."
    return _utility_words(kept)


def degeneracy_table(rows: Sequence[Row], traces: int | None = None) -> list[list[str]]:
    """Means over seeds of how completions end, header first; empty if nobody measured it."""
    index = _Index(rows, traces)
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


def plain_words(rows: Sequence[Row], traces: int | None = None) -> list[str]:
    """What was found, a few sentences for each student and defense.

    Without a student there is nothing to say of thieves, so the teacher is described instead.
    """
    if not any(row.role == "student" for row in rows):
        return _teacher_words(rows)
    found = headline(rows, traces)
    by_line = {item.line: item for item in found}
    sentences = []
    for item in found:
        if item.line.cleanup == "none":
            baseline = _baseline(by_line, item.line)
            cleaned = [other for other in found if _cleans(other.line, item.line)]
            sentences.append(_words(item, baseline, cleaned))
    return sentences


def _baseline(found: Mapping[Line, Headline], line: Line) -> Headline | None:
    if line.defense == BASELINE:
        return None
    for other, item in found.items():
        if other._replace(strength=None) == line._replace(defense=BASELINE, strength=None):
            return item
    return None


def _cleans(line: Line, original: Line) -> bool:
    return line.cleanup != "none" and line._replace(cleanup="none") == original


def _words(item: Headline, baseline: Headline | None, cleaned: Sequence[Headline]) -> str:
    line = item.line
    opening = f"Student {line.model}, {line.label}, {item.traces} traces: "
    sentences = [f"{opening}{_effect_words(item)}"]
    if baseline is not None:
        sentences.append(_baseline_words(item, baseline))
    for other in cleaned:
        removed = _effect(other.gain_removed)
        sentences.append(f"After the clean-up {other.line.cleanup}: {removed}.")
    sentences.append(_utility_words(item.utility_kept))
    if item.price_multiplier.defined:
        price = times(item.price_multiplier).replace(" times", " times as many traces")
        sentences.append(f"For the same accuracy a thief needs {price}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _effect_words(item: Headline) -> str:
    if not item.clean_student.defined or not item.base_student.defined:
        return "the gain removed is unknown, since the clean or the base student is missing."
    if not item.gain_removed.defined:
        return "there was no gain to remove: clean traces did not make the student better."
    return f"{_effect(item.gain_removed)}."


def _effect(removed: Estimate) -> str:
    if not removed.defined:
        return "the gain removed is unknown"
    shown = percent(removed)
    if removed.lo <= 0 <= removed.hi:
        return f"no effect that can be told from chance (gain removed {shown})"
    if removed.hi < 0:
        return f"it helped the thief (gain removed {shown})"
    if removed.lo > 1:
        return f"the student ended below where it started (gain removed {shown})"
    return f"the defense removed {shown} of the gain"


def _utility_words(kept: Estimate) -> str:
    if not kept.defined:
        return "The accuracy of the defended teacher was not measured."
    if kept == CERTAIN:
        return "The teacher's answers are unchanged."
    verdict = "" if kept.lo <= 1 <= kept.hi else ", which users will notice"
    if kept.lo > 1:
        verdict = ", more than it had"
    return f"The teacher kept {percent(kept)} of its accuracy{verdict}."


def _baseline_words(item: Headline, baseline: Headline) -> str:
    mine, other = item.gain_removed, baseline.gain_removed
    if not mine.defined or not other.defined:
        return ""
    if mine.overlaps(other):
        verdict = f"no clear difference from {BASELINE}"
    else:
        verdict = f"{'more' if mine.value > other.value else 'less'} than {BASELINE}"
    return f"That is {verdict}, which removes {percent(other)}."


def word_changes(clean: str, defended: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces; a piece is marked if its words are not in the other text there.

    Joining the pieces gives each text back.
    """
    left, right = (re.findall(r"\S+\s*|\s+", text) for text in (clean, defended))
    bare_left, bare_right = ([word.rstrip() for word in words] for words in (left, right))
    before: list[Piece] = []
    after: list[Piece] = []
    matcher = difflib.SequenceMatcher(None, bare_left, bare_right, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        for pieces, words in ((before, left[a:b]), (after, right[c:d])):
            if words:
                pieces.append(Piece("".join(words), kind != "equal"))
    return before, after


def write_report(folder: Path) -> Path:
    """Write `report.html` and `figures/*.png` beside `results.json`.

    `curves.json` and `examples.json` are used if they are there; a section without data is left
    out.

    Returns:
        The path of the page.

    Raises:
        ValueError: if a file is broken or of another schema; the message names it.
    """
    run, rows = read_document(folder / "results.json")
    curves = _optional(folder / "curves.json", LossCurve)
    examples = _optional(folder / "examples.json", Example)
    traces = run.get("traces") if isinstance(run.get("traces"), int) else None
    drawn = figures(rows, curves, traces)
    _save_pngs(drawn, folder / "figures")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        run={key: _plain(value) for key, value in run.items()},
        title=run.get("name") or "Results",
        words=[*plain_words(rows, traces), *_texts(run.get("notes"))],
        headlines=headline(rows, traces),
        percent=percent,
        times=times,
        table=result_table(rows, traces),
        teachers=teacher_table(rows),
        degeneracy=degeneracy_table(rows, traces),
        other=other_table(rows),
        figures=[(name, _svg(figure), *CAPTIONS[name]) for name, figure in drawn.items()],
        examples=[(item, *word_changes(item.clean, item.defended)) for item in examples][:EXAMPLES],
        example_count=len(examples),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _optional(path: Path, kind: type[C]) -> list[C]:
    if not path.is_file():
        return []
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(items, list):
        raise ValueError(f"{path} must hold a list, got {type(items).__name__}")
    found = []
    for index, item in enumerate(items):
        try:
            found.append(kind.model_validate(item))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in (index, *first["loc"]))
            raise ValueError(f"{path} cannot be used: {place}: {first['msg']}") from None
    return found


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


CAPTIONS = {
    "utility_vs_gain": (
        "What users keep against what the thief loses",
        "Each point is one student and one defense. Right is better for users, up is better for "
        "the provider; at 0 % gain removed the defense does nothing. Bars are 95 % intervals.",
    ),
    "budget_curve": (
        "Student accuracy against stolen traces",
        "Means over seeds with 95 % bands. The price multiplier says how many times as many "
        "defended traces a thief needs for the accuracy that clean ones give.",
    ),
    "students": (
        "Accuracy of every student",
        "Means over seeds with 95 % intervals over seeds and problems.",
    ),
    "loss_curves": ("Training loss", "Nats a token at each logged step."),
}
"""Title and caption of each figure, by file name."""


def figures(
    rows: Sequence[Row], curves: Sequence[LossCurve] = (), traces: int | None = None
) -> dict[str, Figure]:
    """The figures that the data allow, by file name without its ending."""
    index = _Index(rows, traces)
    found = headline(rows, traces)
    drawn = {
        "utility_vs_gain": _utility_figure(found),
        "budget_curve": _budget_figure(index, found),
        "students": _bar_figure(index),
        "loss_curves": _loss_figure(curves),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _utility_figure(found: Sequence[Headline]) -> Figure | None:
    points = [
        item
        for item in found
        if item.line.cleanup == "none" and item.utility_kept.defined and item.gain_removed.defined
    ]
    if not points:
        return None
    panels = list(dict.fromkeys((item.line.task, item.line.model) for item in points))
    figure = Figure(figsize=(max(5.6, 4.0 * len(panels)), 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    colours = _colours(item.line for item in points)
    ends = [end for item in points for end in (item.gain_removed.lo, item.gain_removed.hi)]
    low = max(-1.0, min(-0.1, *ends) - 0.05)
    high = min(2.0, max(1.05, *ends) + 0.05)
    for axes, panel in zip(grid, panels, strict=True):
        for item in points:
            if (item.line.task, item.line.model) == panel:
                _utility_point(axes, item, colours[item.line.label], (low, high))
        axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_title(f"student {panel[1]}", fontsize=10)
        axes.set_xlabel("utility kept (teacher, defended / clean)")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _finish(axes)
    grid[0].set_ylabel("gain removed")
    grid[0].set_ylim(low, high)
    left, right = grid[0].get_xlim()
    grid[0].set_xlim(min(left, 0.9), max(right, 1.02))
    _legend_below(figure, grid)
    return figure


def _utility_point(axes: Axes, item: Headline, colour: str, limits: tuple[float, float]) -> None:
    axes.errorbar(
        item.utility_kept.value,
        item.gain_removed.value,
        xerr=_arms(item.utility_kept, 0.0, 2.0),
        yerr=_arms(item.gain_removed, *limits),
        fmt="o",
        color=colour,
        capsize=3,
        markersize=8,
        elinewidth=1.3,
        label=item.line.label,
    )


def _legend_below(figure: Figure, grid: Iterable[Axes]) -> None:
    """One legend for all panels; a name that several of them use is shown once."""
    named: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=min(len(named), 5),
        frameon=False,
        fontsize=9,
    )


def _budget_figure(index: _Index, found: Sequence[Headline]) -> Figure | None:
    lines = [
        line
        for line in index.lines()
        if line.stolen and line.cleanup == "none" and len(_bought(index.curves[line])) > 1
    ]
    if not lines:
        return None
    panels = list(dict.fromkeys((line.task, line.model) for line in lines))
    figure = Figure(figsize=(max(5.6, 4.3 * len(panels)), 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    colours = _colours(lines)
    prices = {item.line: item.price_multiplier for item in found}
    for axes, panel in zip(grid, panels, strict=True):
        inside = [line for line in lines if (line.task, line.model) == panel]
        for line in inside:
            _budget_line(axes, _bought(index.curves[line]), colours[line.label], line.label)
        for line in index.curves:
            if (line.task, line.model) == panel and not line.stolen:
                style = "--" if line.attack == "none" else ":"
                level = mean_accuracy(index.measured(line)).value
                axes.axhline(level, color=GREY, linestyle=style, label=line.label)
        axes.set_title(_panel_title(panel[1], inside, prices), fontsize=9.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({count for line in inside for count in _bought(index.curves[line])}))
        axes.tick_params(axis="x", labelrotation=45)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("stolen traces")
        _finish(axes)
    grid[0].set_ylabel("student accuracy")
    _legend_below(figure, grid)
    return figure


def _budget_line(
    axes: Axes, curve: Mapping[int, Sequence[Accuracy]], colour: str, label: str
) -> None:
    estimates = [mean_accuracy(measured) for measured in curve.values()]
    counts = list(curve)
    axes.plot(counts, [item.value for item in estimates], "o-", color=colour, label=label)
    lows, highs = [item.lo for item in estimates], [item.hi for item in estimates]
    axes.fill_between(counts, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _panel_title(model: str, lines: Sequence[Line], prices: Mapping[Line, Estimate]) -> str:
    known = [line for line in lines if line in prices and prices[line].defined]
    return "\n".join([f"student {model}", *(f"{x.label}: {times(prices[x])}" for x in known)])


def _bar_figure(index: _Index) -> Figure | None:
    lines = index.lines()
    if not lines:
        return None
    panels = list(dict.fromkeys((line.task, line.model) for line in lines))
    most = max(sum((line.task, line.model) == panel for line in lines) for panel in panels)
    # Panels stand above one another: the names of the bars need the width.
    size = (7.2, (0.34 * most + 0.75) * len(panels) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    colours = _colours(line._replace(cleanup="none") for line in lines)
    for axes, panel in zip(grid, panels, strict=True):
        inside = [line for line in lines if (line.task, line.model) == panel]
        for place, line in enumerate(inside):
            estimate = mean_accuracy(index.measured(line))
            colour = colours[line._replace(cleanup="none").label] if line.stolen else GREY
            axes.barh(
                place,
                estimate.value,
                color=colour,
                alpha=0.85 if line.cleanup == "none" else 0.5,
                xerr=_arms(estimate, 0.0, 1.0),
                error_kw={"elinewidth": 1.2, "capsize": 3},
            )
        axes.set_yticks(range(len(inside)), [line.label for line in inside])
        axes.invert_yaxis()
        axes.set_title(f"student {panel[1]}", fontsize=10, loc="left")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _finish(axes)
    grid[-1].set_xlabel("accuracy")
    return figure


def _loss_figure(curves: Sequence[LossCurve]) -> Figure | None:
    if not curves:
        return None
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    figure = Figure(figsize=(max(6.4, 4.4 * len(kinds)), 3.8), layout="constrained")
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        named: set[str] = set()
        for curve in curves:
            if curve.kind != kind:
                continue
            label = curve.label
            colour = COLOURS[labels.index(label) % len(COLOURS)]
            shown = None if label in named else label
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.3, alpha=0.9, label=shown)
            named.add(label)
        axes.set_title(f"{kind} training", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        axes.legend(frameon=False, fontsize=8)
        _finish(axes)
    return figure


def _colours(lines: Iterable[Line]) -> dict[str, str]:
    """One colour a label; clean traces always have the first."""
    labels = list(dict.fromkeys(line.label for line in lines if line.stolen))
    rest = [label for label in labels if label != "clean traces"]
    named = {label: COLOURS[1 + i % (len(COLOURS) - 1)] for i, label in enumerate(rest)}
    return named | {"clean traces": COLOURS[0]}


def _arms(estimate: Estimate, least: float, most: float) -> list[list[float]]:
    """Lengths of the two error bars, cut at the edges of the picture."""
    low, high = max(estimate.lo, least), min(estimate.hi, most)
    return [[max(estimate.value - low, 0.0)], [max(high - estimate.value, 0.0)]]


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _save_pngs(drawn: Mapping[str, Figure], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")


def _svg(figure: Figure) -> str:
    """The figure as a data address; the same figure always gives the same bytes."""
    target = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "azeotrope"}):
        figure.savefig(target, format="svg", facecolor="white", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(target.getvalue()).decode()
