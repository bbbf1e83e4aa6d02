"""Result rows -> lines of the compact tables: students with equal settings, over seeds."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from azeotrope.defenses.base import strength_label
from azeotrope.report.intervals import Accuracy
from azeotrope.report.rows import ResultRow

BASELINE = "answers_only"


class Line(NamedTuple):
    """The subject of one line of the compact table: a student and what it learned from."""

    task: str
    model: str
    defense: str
    strength: float | None
    attack: str
    variant: str
    cleanup: str

    @property
    def stolen(self) -> bool:
        """Whether the student was trained on the teacher's output."""
        return self.attack not in {"none", "sft_only"}

    @property
    def defense_label(self) -> str:
        return strength_label(self.defense, self.strength)

    @property
    def attack_label(self) -> str:
        """The attack with its variant and clean-ups: `text_sft, after digits`."""
        variant = "" if self.variant == "none" else f", {self.variant}"
        cleanup = "" if self.cleanup == "none" else f", after {self.cleanup}"
        return f"{self.attack}{variant}{cleanup}"

    @property
    def label(self) -> str:
        """What the student learned from, in a few words."""
        if self.attack == "none":
            return "base student"
        if self.attack == "sft_only":
            return "ground truth only"
        reads_text = self.attack == "text_sft"
        undefended = "clean traces" if reads_text else "clean logits"
        source = undefended if self.defense == "none" else self.defense_label
        # Learning from text is what every run does, so only the changes to it are named.
        attack = self.attack_label.removeprefix("text_sft, ")
        return source if attack == "text_sft" else f"{source}, {attack}"


def line_of(row: ResultRow) -> Line:
    """The line of the compact table that a row belongs to."""
    return Line(
        row.task, row.model, row.defense, row.strength, row.attack, row.variant, row.cleanup
    )


class Index:
    """Accuracies by line, budget and seed, and by teacher."""

    def __init__(self, rows: Sequence[ResultRow], traces: int | None = None) -> None:
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
            variant = (line.variant != "none", *_natural(line.variant))
            cleanup = (line.cleanup != "none", *_natural(line.cleanup))
            return (
                line.task,
                models.index(line.model),
                rank,
                *defended,
                line.strength or 0.0,
                line.attack,
                *variant,
                *cleanup,
            )

        return sorted(self.curves, key=order)

    def budget(self, line: Line) -> int:
        """The main budget, or the line's own largest if the main one was not measured."""
        budgets = self.curves[line]
        return self.traces if self.traces in budgets else max(budgets)

    def measured(self, line: Line) -> list[Accuracy]:
        return self.curves[line][self.budget(line)]

    def origin(self, line: Line) -> Line:
        """The same attack without clean-ups, and without its variant if that was measured too."""
        uncleaned = line._replace(cleanup="none")
        plain = uncleaned._replace(variant="none")
        return plain if plain in self.curves else uncleaned

    def is_naive(self, line: Line) -> bool:
        """Whether an attack is measured as it comes: an adaptive one has an origin besides it."""
        return self.origin(line) == line

    def undefended(self, line: Line, *, attack: str | None = None) -> Line | None:
        """The undefended, uncleaned line of the same student; None if it was not measured.

        An attack is compared with its plain form, or with its own variant if that is all there is.
        """
        for variant in dict.fromkeys(("none", line.variant)):
            line_key = (line.task, line.model, "none", attack or line.attack, variant, "none")
            for candidate in self.curves:
                if (*candidate[:3], *candidate[4:]) == line_key:
                    return candidate
        return None

    def teacher(self, line: Line, defense: str, *, greedy: bool) -> list[Accuracy]:
        """Accuracies of a defended teacher at the line's strength; empty if not measured."""
        strengths = {key[2] for key in self.teachers if key[:2] == (line.task, defense)}
        strength = line.strength if line.strength in strengths else next(iter(strengths), None)
        if len(strengths) > 1 and line.strength not in strengths:
            return []
        for key in sorted(self.teachers, key=lambda key: key[3]):
            if key[:3] == (line.task, defense, strength) and (key[3] == "greedy") == greedy:
                return self.teachers[key]
        # Hiding the reasoning changes no answer, so that teacher need not be measured again.
        return self.teacher(line, "none", greedy=greedy) if defense == BASELINE else []


def _natural(name: str) -> tuple[str, float]:
    """`pairs=8` before `pairs=16`."""
    head, sign, number = name.partition("=")
    try:
        return head, float(number) if sign else 0.0
    except ValueError:
        return name, 0.0


def _main_budget(curves: Mapping[Line, Mapping[int, Sequence[Accuracy]]]) -> int:
    """The budget that most lines share; the largest such."""
    counts: dict[int, int] = defaultdict(int)
    for line, budgets in curves.items():
        for count in budgets:
            counts[count] += line.stolen
    return max(counts, key=lambda count: (counts[count], count), default=0)
