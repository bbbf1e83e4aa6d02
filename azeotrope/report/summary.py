"""Result rows -> sentences: what was removed, what it cost, and "no effect" when there is none."""

import math
from collections.abc import Mapping, Sequence

from azeotrope.report.headlines import CERTAIN, BestAttack, Headline, best_attacks, headline
from azeotrope.report.intervals import Accuracy, Estimate, utility_kept
from azeotrope.report.lines import BASELINE, Line
from azeotrope.report.paired import PairedTest, find_test
from azeotrope.report.rows import ResultRow
from azeotrope.report.tables import PROBLEMS_ONLY, defense_cell, percent, teacher_rows, times


def plain_words(
    rows: Sequence[ResultRow], traces: int | None = None, paired: Sequence[PairedTest] = ()
) -> list[str]:
    """The findings in sentences: the best attack on every defense first, then the details.

    A run without students says nothing about attackers, so the teacher is described instead.

    Args:
        traces: the budget to report; the largest that most lines have if it is None.
        paired: tests of defended teachers, to be told beside utility kept.
    """
    if not any(row.role == "student" for row in rows):
        return _teacher_words(rows)
    headlines = headline(rows, traces)
    by_line = {item.line: item for item in headlines}
    sentences = [_best_words(item) for item in best_attacks(headlines)]
    for item in headlines:
        if item.is_naive:
            adaptive = [change for change in headlines if _adapts(change, item)]
            test = find_test(paired, item.line.defense, item.line.strength)
            sentences.append(_words(item, _baseline(by_line, item.line), adaptive, test))
    if any(item.seeds == 1 for item in headlines):
        sentences.append(
            f"Note: {PROBLEMS_ONLY}, not the chance in training; another seed may land outside."
        )
    return [sentence for sentence in sentences if sentence]


def _best_words(attack: BestAttack) -> str:
    """The attacker's best result; empty if only one attack was tried."""
    best, naive = attack.best, attack.naive
    if naive is None or best is naive:
        return ""
    return (
        f"Best attack on {best.line.defense_label}, student {best.line.model}: "
        f"{best.line.attack_label}, accuracy {percent(best.student)}, "
        f"gain removed {percent(best.gain_removed)}; the naive attack {naive.line.attack_label} "
        f"reaches {percent(naive.student)}, gain removed {percent(naive.gain_removed)}."
    )


def _teacher_words(rows: Sequence[ResultRow]) -> list[str]:
    """What a run without students shows, and what it cannot show."""
    teachers = teacher_rows(rows)
    if not teachers:
        return []
    clean = {(row.task, row.decoding): row for row in teachers if row.defense == "none"}
    sentences = [
        "No student was trained in this run, so it does not show what a defense takes from an "
        "attacker; it shows what the teacher itself can still do."
    ]
    for row in teachers:
        correct = f"{round(row.value * row.n)} of {row.n} problems"
        result = f"{row.decoding}: {correct}, {percent(Estimate(row.value, *row.ci95))}"
        if row.defense == "none":
            sentences.append(f"The undefended teacher solves, {result}.")
            continue
        words = f"With {defense_cell(row)} it solves, {result}."
        if row.strength == 0:
            words += " At strength 0 it is the undefended teacher."
        before = clean.get((row.task, row.decoding))
        if before is not None:
            words += f" {_kept_words(before, row)}"
        sentences.append(words)
    return sentences


def _kept_words(clean: ResultRow, defended: ResultRow) -> str:
    kept = utility_kept([Accuracy(clean.value, clean.n)], [Accuracy(defended.value, defended.n)])
    if not kept.defined:
        return "The undefended one solves none, so the utility kept is undefined."
    return _utility_words(kept)


def _baseline(headlines: Mapping[Line, Headline], line: Line) -> Headline | None:
    """The same attack on the teacher that hides its reasoning."""
    if line.defense == BASELINE:
        return None
    baseline_line = line._replace(defense=BASELINE, strength=None)
    for candidate, item in headlines.items():
        if candidate._replace(strength=None) == baseline_line:
            return item
    return None


def _adapts(item: Headline, naive: Headline) -> bool:
    """Whether an attack is the naive one with a variant or clean-ups."""
    naive_line = naive.line
    same = item.line._replace(variant=naive_line.variant, cleanup=naive_line.cleanup) == naive_line
    return not item.is_naive and same


def _words(
    item: Headline,
    baseline: Headline | None,
    adaptive: Sequence[Headline],
    test: PairedTest | None,
) -> str:
    line = item.line
    opening = f"Student {line.model}, {line.label}, {item.traces} traces: "
    sentences = [f"{opening}{_effect_words(item)}"]
    if baseline is not None:
        sentences.append(_baseline_words(item, baseline))
    sentences.append(_sft_words(item))
    sentences += [f"{_change_words(x.line)}: {_effect(x.gain_removed)}." for x in adaptive]
    sentences.append(_utility_words(item.utility_kept, test))
    if item.price_multiplier.defined:
        price = times(item.price_multiplier).replace(" times", " times as many traces")
        sentences.append(f"For the same accuracy an attacker needs {price}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _change_words(line: Line) -> str:
    """How an adaptive attack differs from the naive one."""
    cleanup = "" if line.cleanup == "none" else f"after the clean-up {line.cleanup}"
    variant = "" if line.variant == "none" else f"with {line.variant}"
    words = " and ".join(part for part in (variant, cleanup) if part)
    return words[0].upper() + words[1:]


def _sft_words(item: Headline) -> str:
    """Whether querying the teacher gave more than the ground truth does."""
    truth, student = item.sft_student, item.student
    if not truth.defined or not student.defined:
        return ""
    numbers = f"{percent(student)} against {percent(truth)}"
    if student.overlaps(truth):
        return f"That student is not clearly different from ground truth alone ({numbers})."
    if student.value < truth.value:
        return f"That student is worse than with ground truth alone ({numbers})."
    return f"That student is still better than with ground truth alone ({numbers})."


def _effect_words(item: Headline) -> str:
    if not item.clean_student.defined or not item.base_student.defined:
        return "the gain removed is unknown, since the clean or the base student is missing."
    if not item.gain_removed.defined:
        return "there was no gain to remove: clean traces did not make the student better."
    return f"{_effect(item.gain_removed)}."


def _effect(removed: Estimate) -> str:
    if not removed.defined:
        return "the gain removed is unknown"
    gain = percent(removed)
    if math.isinf(removed.lo) and math.isinf(removed.hi):
        return "the gain removed is not determined: clean traces may have taught nothing"
    if removed.lo <= 0 <= removed.hi:
        return f"no effect that can be told from chance (gain removed {gain})"
    if removed.hi < 0:
        return f"it helped the attacker (gain removed {gain})"
    if removed.lo > 1:
        return f"the student ended below where it started (gain removed {gain})"
    return f"the defense removed {gain} of the gain"


def _utility_words(kept: Estimate, test: PairedTest | None = None) -> str:
    if not kept.defined:
        return "The accuracy of the defended teacher was not measured."
    if kept == CERTAIN:
        return "The teacher's answers are unchanged."
    verdict = "" if kept.lo <= 1 <= kept.hi else ", which is less than all of it"
    if kept.lo > 1:
        verdict = ", more than it had"
    paired = "" if test is None else f" (McNemar test on {test.n} problems: p = {test.p:.2g})"
    return f"The teacher kept {percent(kept)} of its accuracy{verdict}{paired}."


def _baseline_words(item: Headline, baseline: Headline) -> str:
    own, reference = item.gain_removed, baseline.gain_removed
    if not own.defined or not reference.defined:
        return ""
    if own.overlaps(reference):
        verdict = f"no clear difference from {BASELINE}"
    else:
        verdict = f"{'more' if own.value > reference.value else 'less'} than {BASELINE}"
    return f"That is {verdict}, which removes {percent(reference)}."
