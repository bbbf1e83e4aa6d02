"""The headline numbers of every student that learned from defended traces."""

from collections.abc import Sequence
from dataclasses import dataclass

from azeotrope.report.intervals import (
    UNDEFINED,
    Accuracy,
    Curve,
    Estimate,
    gain_removed,
    mean_accuracy,
    utility_kept,
)
from azeotrope.report.lines import BASELINE, Index, Line
from azeotrope.report.prices import price_multiplier
from azeotrope.report.rows import ResultRow

CERTAIN = Estimate(1.0, 1.0, 1.0)
"""Utility kept by a defense that changes no answer."""


@dataclass(frozen=True)
class Headline:
    """The headline numbers of one student trained on defended traces."""

    line: Line
    is_naive: bool
    """Whether the attack is used as it comes, without clean-ups or variants."""
    traces: int
    seeds: int
    student: Estimate
    clean_student: Estimate
    base_student: Estimate
    sft_student: Estimate
    """Trained on the ground truth alone: what an attacker has without querying the teacher."""
    utility_kept: Estimate
    gain_removed: Estimate
    price_multiplier: Estimate


@dataclass(frozen=True)
class BestAttack:
    """The most successful attack on one defense of one student, beside the naive attack."""

    best: Headline
    naive: Headline | None


def headline(rows: Sequence[ResultRow], traces: int | None = None) -> list[Headline]:
    """The headline numbers of every student that learned from defended traces.

    Clean-ups are compared with the clean student without one: they say what the defense still
    removes after the attacker's best efforts.

    Args:
        traces: the budget to report; the largest that most lines have if it is None.
    """
    index = Index(rows, traces)
    defended = [line for line in index.lines() if line.stolen and line.defense != "none"]
    return [_headline(index, line) for line in defended]


def best_attacks(headlines: Sequence[Headline]) -> list[BestAttack]:
    """For every student and defense the attack with the highest accuracy, in the order given.

    The best one is chosen on the problems that it is reported on, which favours the attacker a
    little: the safe direction for a defender.
    """
    groups: dict[Line, list[Headline]] = {}
    for item in headlines:
        group = item.line._replace(attack="", variant="", cleanup="")
        groups.setdefault(group, []).append(item)
    results = []
    for group in groups.values():
        naive = [item for item in group if item.is_naive]
        # Text is what every API shows, so learning from it is the naive attack where it was run.
        naive.sort(key=lambda item: item.line.attack != "text_sft")
        best = max(group, key=lambda item: item.student.value)
        results.append(BestAttack(best, naive[0] if naive else None))
    return results


def bought(curve: Curve) -> dict[int, Sequence[Accuracy]]:
    """The part of a curve that a logarithmic axis can hold."""
    return {count: measured for count, measured in curve.items() if count}


def _headline(index: Index, line: Line) -> Headline:
    budget, measured = index.budget(line), index.measured(line)
    clean_line, base_line = index.undefended(line), index.undefended(line, attack="none")
    sft_line = index.undefended(line, attack="sft_only")
    clean_curve = {} if clean_line is None else index.curves[clean_line]
    clean = clean_curve.get(budget, [])
    base = [] if base_line is None else index.measured(base_line)
    return Headline(
        line=line,
        is_naive=index.is_naive(line),
        traces=budget,
        seeds=len(measured),
        student=mean_accuracy(measured),
        clean_student=mean_accuracy(clean) if clean else UNDEFINED,
        base_student=mean_accuracy(base) if base else UNDEFINED,
        sft_student=mean_accuracy(index.measured(sft_line)) if sft_line else UNDEFINED,
        utility_kept=_utility(index, line),
        gain_removed=gain_removed(clean, measured, base) if clean and base else UNDEFINED,
        price_multiplier=price_multiplier(bought(clean_curve), bought(index.curves[line])),
    )


def _utility(index: Index, line: Line) -> Estimate:
    for greedy in (True, False):
        clean = index.teacher(line, "none", greedy=greedy)
        defended = index.teacher(line, line.defense, greedy=greedy)
        if clean and defended:
            return CERTAIN if defended is clean else utility_kept(clean, defended)
    return CERTAIN if line.defense == BASELINE else UNDEFINED
