"""Result rows and training logs -> the figures that only some runs have."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from azeotrope.defenses.base import strength_label
from azeotrope.report.figures import Plot, PlotLine
from azeotrope.report.intervals import Accuracy, mean_accuracy
from azeotrope.report.rows import ResultRow

_PAIRS = re.compile(r"^pairs=(\d+)$")


def plots_of(
    rows: Sequence[ResultRow], heads: Sequence[tuple[str, list[dict[str, Any]]]]
) -> list[Plot]:
    """Training curves of heads with several terms, inversion curves, information and accuracy."""
    rows = _told_apart(rows)
    terms = [_terms(number, *pair) for number, pair in enumerate(heads, 1)]
    found = (_divergences(rows), *terms, _inversion(rows), _information(rows))
    return [plot for plot in found if plot is not None]


def _told_apart(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Defenses of one name and several strengths get the strength into their name."""
    strengths: dict[str, set[float | None]] = defaultdict(set)
    for row in rows:
        strengths[row.defense].add(row.strength)
    return [
        row.model_copy(update={"defense": strength_label(row.defense, row.strength)})
        if len(strengths[row.defense]) > 1 and row.strength is not None
        else row
        for row in rows
    ]


def _divergences(rows: Sequence[ResultRow]) -> Plot | None:
    """Every attack on logits on every teacher, beside the student of the ground truth alone."""
    scores: dict[tuple[str, str, str], list[Accuracy]] = defaultdict(list)
    for row in _students(rows):
        if _is_plain(row):
            scores[(row.model, row.defense, row.attack)].append(Accuracy(row.value, row.n))
    attacks = list(dict.fromkeys(a for _, _, a in scores if a not in _NO_LOGITS))
    if not attacks:
        return None
    lines: list[PlotLine] = []
    several = len({model for model, _, _ in scores}) > 1
    for model, defense in dict.fromkeys((m, d) for m, d, a in scores if a in attacks):
        known = [place for place, a in enumerate(attacks) if (model, defense, a) in scores]
        found = [mean_accuracy(scores[(model, defense, attacks[place])]) for place in known]
        name = "clean" if defense == "none" else defense
        lines.append(
            PlotLine(
                label=f"{name}, {model}" if several else name,
                x=[float(place) for place in known],
                y=[item.value for item in found],
                low=[item.lo for item in found],
                high=[item.hi for item in found],
                connected=False,
            )
        )
    for (model, _, attack), measured in scores.items():
        if attack == "sft_only":
            level = mean_accuracy(measured).value
            label = f"ground truth alone, {model}" if several else "ground truth alone"
            lines.append(PlotLine(label=label, x=[0.0, len(attacks) - 1.0], y=[level, level]))
    return Plot(
        name="divergences",
        title="What distillation from logits brings",
        caption="Student accuracy after each attack on each teacher's logits, without variants; "
        "means over seeds with 95 % intervals.",
        x_label="attack",
        y_label="student accuracy",
        ticks=attacks,
        lines=lines,
    )


def _terms(number: int, label: str, heads: list[dict[str, Any]]) -> Plot | None:
    """The loss of a defense and its terms over all passes, as the paper of CMI shows them."""
    loss = [value for head in heads for _, value in head["log"]]
    parts = [entry for head in heads for entry in head.get("parts", [])]
    if not parts or not any(parts):
        return None
    steps = [float(number + 1) for number in range(len(loss))]
    lines = [PlotLine(label="loss", x=steps, y=loss)]
    for name in sorted({name for entry in parts for name in entry}):
        points = [(x, entry[name]) for x, entry in zip(steps, parts, strict=True) if name in entry]
        lines.append(PlotLine(label=name, x=[p[0] for p in points], y=[p[1] for p in points]))
    return Plot(
        name=f"head_terms_{number}_" + re.sub(r"[^a-z0-9]+", "_", label.lower()),
        title=f"Training of {label}: the loss and its terms",
        caption=f"{len(heads)} passes one after another. The cosine between what a surrogate would "
        "learn from defended and from clean logits starts at 1, where they are the same.",
        x_label="logged step",
        y_label="nats a token; cosine",
        lines=lines,
    )


def _inversion(rows: Sequence[ResultRow]) -> Plot | None:
    """Student accuracy against the clean logits that the thief holds beside defended ones."""
    curves: dict[tuple[str, str, str], dict[float, list[Accuracy]]] = defaultdict(dict)
    for row in _students(rows):
        match = _PAIRS.match(row.variant)
        if match:
            points = curves[(row.model, row.defense, row.attack)]
            points.setdefault(float(match[1]), []).append(Accuracy(row.value, row.n))
    if not curves:
        return None
    lines = []
    for (model, defense, attack), points in curves.items():
        counts = sorted(points)
        found = [mean_accuracy(points[count]) for count in counts]
        lines.append(
            PlotLine(
                label=f"{model}: {defense}, {attack}, matrix undone",
                x=counts,
                y=[item.value for item in found],
                low=[item.lo for item in found],
                high=[item.hi for item in found],
            )
        )
        for other, words in ((defense, "matrix left"), ("none", "clean logits")):
            level = _level(rows, model, other, attack)
            if level is not None:
                ends = [counts[0], counts[-1]]
                lines.append(PlotLine(label=words, x=ends, y=[level, level]))
    return Plot(
        name="inversion",
        title="How many clean logits undo the matrix",
        caption="The thief fits a linear map from pairs of defended and clean logits at the same "
        "positions, then distils from what it gives back. Bands are 95 % intervals.",
        x_label="pairs of clean and defended logits",
        y_label="student accuracy",
        log_x=True,
        lines=lines,
    )


def _information(rows: Sequence[ResultRow]) -> Plot | None:
    """I(X; Z | Y) of each teacher against what students of it reach."""
    known = {row.defense: row.value for row in rows if row.metric == "information"}
    points: dict[str, list[tuple[float, Any]]] = defaultdict(list)
    scores: dict[tuple[str, str], list[Accuracy]] = defaultdict(list)
    for row in _students(rows):
        if row.defense in known and _is_plain(row) and row.attack not in _NO_LOGITS:
            scores[(row.attack, row.defense)].append(Accuracy(row.value, row.n))
    for (attack, defense), values in scores.items():
        points[attack].append((known[defense], mean_accuracy(values)))
    if len(known) < 2 or not points:
        return None
    lines = []
    for attack, items in points.items():
        items = sorted(items, key=lambda item: item[0])
        lines.append(
            PlotLine(
                label=attack,
                x=[x for x, _ in items],
                y=[item.value for _, item in items],
                low=[item.lo for _, item in items],
                high=[item.hi for _, item in items],
            )
        )
    return Plot(
        name="information",
        title="Does the information in the logits predict what a student learns?",
        caption="Each point is one teacher: the estimate of I(X; Z | Y) on texts held out, and the "
        "accuracy of students that learned from its logits.",
        x_label="I(X; Z | Y), nats a token",
        y_label="student accuracy",
        lines=lines,
    )


_NO_LOGITS = {"none", "sft_only", "text_sft"}


def _students(rows: Sequence[ResultRow]) -> list[ResultRow]:
    return [row for row in rows if row.role == "student" and row.metric == "accuracy"]


def _is_plain(row: ResultRow) -> bool:
    """Whether an attack was used as it comes, without a variant or clean-ups."""
    return row.variant == "none" and row.cleanup == "none"


def _level(rows: Sequence[ResultRow], model: str, defense: str, attack: str) -> float | None:
    values = [
        row.value
        for row in _students(rows)
        if (row.model, row.defense, row.attack) == (model, defense, attack) and _is_plain(row)
    ]
    return sum(values) / len(values) if values else None
