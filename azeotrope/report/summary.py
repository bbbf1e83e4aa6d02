"""Result rows -> sentences: what was removed, what it cost, and "no effect" when there is none."""

from collections.abc import Mapping, Sequence

from azeotrope.report.statistics import Accuracy, Estimate, Row, utility_kept
from azeotrope.report.tables import (
    BASELINE,
    CERTAIN,
    Headline,
    Line,
    defense_cell,
    headline,
    percent,
    teacher_rows,
    times,
)


def _teacher_words(rows: Sequence[Row]) -> list[str]:
    """What a run without students shows, and what it cannot show."""
    teachers = teacher_rows(rows)
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
        words = f"With {defense_cell(row)} it solves, {shown}."
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
    sentences.append(_sft_words(item))
    for other in cleaned:
        removed = _effect(other.gain_removed)
        what = "After the clean-up" if item.line.attack == "text_sft" else "With"
        sentences.append(f"{what} {other.line.cleanup}: {removed}.")
    sentences.append(_utility_words(item.utility_kept))
    if item.price_multiplier.defined:
        price = times(item.price_multiplier).replace(" times", " times as many traces")
        sentences.append(f"For the same accuracy a thief needs {price}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _sft_words(item: Headline) -> str:
    """Whether it was worth asking the teacher at all."""
    alone, student = item.sft_student, item.student
    if not alone.defined or not student.defined:
        return ""
    shown = f"{percent(student)} against {percent(alone)}"
    if student.overlaps(alone):
        return f"The thief ends where the ground truth alone would have brought him ({shown})."
    if student.value < alone.value:
        return f"The thief ends below what the ground truth alone gives ({shown})."
    return f"The thief still ends above what the ground truth alone gives ({shown})."


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
    verdict = "" if kept.lo <= 1 <= kept.hi else ", which is less than all of it"
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
