"""Result rows and training logs -> the figures that only some runs have."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from azeotrope.defenses.base import strength_label
from azeotrope.report.drawing import Plot, PlotLine
from azeotrope.report.intervals import Accuracy, mean_accuracy
from azeotrope.report.rows import ResultRow

HeadLogs = tuple[str, list[dict[str, Any]]]
"""A defense's label and the descriptions of its heads, one per pass."""
_PAIRS = re.compile(r"^pairs=(\d+)$")
_NO_LOGITS = {"none", "sft_only", "text_sft"}
"""What students learn from that is not a teacher's logits."""


@dataclass(frozen=True)
class RowPlot:
    """A figure drawn from result rows; it is left out of a run whose rows give it no line."""

    name: str
    title: str
    caption: str
    x_label: str
    lines: Callable[[Sequence[ResultRow]], list[PlotLine]]
    ticks: Callable[[Sequence[ResultRow]], list[str]] = lambda rows: []
    log_x: bool = False

    def draw(self, rows: Sequence[ResultRow]) -> Plot | None:
        lines = self.lines(rows)
        if not lines:
            return None
        return Plot(
            name=self.name,
            title=self.title,
            caption=self.caption,
            x_label=self.x_label,
            y_label="student accuracy",
            log_x=self.log_x,
            ticks=self.ticks(rows),
            lines=lines,
        )


def plots_of(rows: Sequence[ResultRow], heads: Sequence[HeadLogs]) -> list[Plot]:
    """Training curves of heads with several terms, and every figure of `ROW_PLOTS`."""
    rows = _with_strengths(rows)
    terms = [_terms(number, *logs) for number, logs in enumerate(heads, 1)]
    first, *rest = [row_plot.draw(rows) for row_plot in ROW_PLOTS]
    return [plot for plot in (first, *terms, *rest) if plot is not None]


def accuracy_line(
    label: str, points: Iterable[tuple[float, Sequence[Accuracy]]], *, connected: bool = True
) -> PlotLine:
    """A line through the mean accuracies at some positions, with their 95 % intervals."""
    ordered = sorted(points, key=lambda point: point[0])
    estimates = [mean_accuracy(measured) for _, measured in ordered]
    return PlotLine(
        label=label,
        x=[x for x, _ in ordered],
        y=[estimate.value for estimate in estimates],
        low=[estimate.lo for estimate in estimates],
        high=[estimate.hi for estimate in estimates],
        connected=connected,
    )


def _with_strengths(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Defenses of one name and several strengths get the strength into their name."""
    strengths: dict[str, set[float | None]] = defaultdict(set)
    for row in rows:
        strengths[row.defense].add(row.strength)
    return [
        row.model_copy(update={"defense": strength_label(row.defense, row.strength)})
        if len(strengths[row.defense]) > 1
        else row
        for row in rows
    ]


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
        y_label="nats per token; cosine",
        lines=lines,
    )


def _logit_attacks(rows: Sequence[ResultRow]) -> list[str]:
    """The attacks on logits that were used as they come, in the order of the rows."""
    attacks = (row.attack for row in _students(rows) if _is_plain(row))
    return [attack for attack in dict.fromkeys(attacks) if attack not in _NO_LOGITS]


def _divergence_lines(rows: Sequence[ResultRow]) -> list[PlotLine]:
    """Every attack on logits on every teacher, beside the student of the ground truth alone."""
    scores: dict[tuple[str, str, str], list[Accuracy]] = defaultdict(list)
    for row in _students(rows):
        if _is_plain(row):
            scores[(row.model, row.defense, row.attack)].append(Accuracy(row.value, row.n))
    attacks = _logit_attacks(rows)
    if not attacks:
        return []
    several = len({model for model, _, _ in scores}) > 1
    lines: list[PlotLine] = []
    for model, defense in dict.fromkeys((m, d) for m, d, a in scores if a in attacks):
        name = "clean" if defense == "none" else defense
        points = [
            (float(position), scores[(model, defense, attack)])
            for position, attack in enumerate(attacks)
            if (model, defense, attack) in scores
        ]
        label = f"{name}, {model}" if several else name
        lines.append(accuracy_line(label, points, connected=False))
    for (model, _, attack), measured in scores.items():
        if attack == "sft_only":
            level = mean_accuracy(measured).value
            label = f"ground truth alone, {model}" if several else "ground truth alone"
            lines.append(PlotLine(label=label, x=[0.0, len(attacks) - 1.0], y=[level, level]))
    return lines


def _inversion_lines(rows: Sequence[ResultRow]) -> list[PlotLine]:
    """Accuracy against the clean logits that the attacker holds beside defended ones."""
    curves: dict[tuple[str, str, str], dict[float, list[Accuracy]]] = defaultdict(dict)
    for row in _students(rows):
        match = _PAIRS.match(row.variant)
        if match:
            points = curves[(row.model, row.defense, row.attack)]
            points.setdefault(float(match[1]), []).append(Accuracy(row.value, row.n))
    lines: list[PlotLine] = []
    for (model, defense, attack), points in curves.items():
        lines.append(accuracy_line(f"{model}: {defense}, {attack}, matrix undone", points.items()))
        ends = [min(points), max(points)]
        for source, label in ((defense, "matrix left"), ("none", "clean logits")):
            level = _level(rows, model, source, attack)
            if level is not None:
                lines.append(PlotLine(label=label, x=ends, y=[level, level]))
    return lines


def _information_lines(rows: Sequence[ResultRow]) -> list[PlotLine]:
    """I(X; Z | Y) of each teacher against the accuracy of its students."""
    information = {row.defense: row.value for row in rows if row.metric == "information"}
    points: dict[str, dict[str, list[Accuracy]]] = defaultdict(lambda: defaultdict(list))
    for row in _students(rows):
        if row.defense in information and _is_plain(row) and row.attack not in _NO_LOGITS:
            points[row.attack][row.defense].append(Accuracy(row.value, row.n))
    if len(information) < 2:
        return []
    return [
        accuracy_line(
            attack, [(information[defense], measured) for defense, measured in scores.items()]
        )
        for attack, scores in points.items()
    ]


ROW_PLOTS = (
    RowPlot(
        name="divergences",
        title="What distillation from logits brings",
        caption="Student accuracy after each attack on each teacher's logits, without variants; "
        "means over seeds with 95 % intervals.",
        x_label="attack",
        lines=_divergence_lines,
        ticks=_logit_attacks,
    ),
    RowPlot(
        name="inversion",
        title="How many clean logits undo the matrix",
        caption="The attacker fits a linear map from pairs of defended and clean logits at the "
        "same positions, then distils from the mapped logits. Bands are 95 % intervals.",
        x_label="pairs of clean and defended logits",
        lines=_inversion_lines,
        log_x=True,
    ),
    RowPlot(
        name="information",
        title="Does the information in the logits predict what a student learns?",
        caption="Each point is one teacher: the estimate of I(X; Z | Y) on texts held out, and the "
        "accuracy of students that learned from its logits.",
        x_label="I(X; Z | Y), nats per token",
        lines=_information_lines,
    ),
)
"""The figures of a run's rows, in the order of the report."""


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
