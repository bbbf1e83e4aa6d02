"""`results.json` -> one HTML page that needs nothing from outside its own file."""

import difflib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader
from pydantic import ValidationError

from azeotrope.config import C, Config, explain
from azeotrope.report.drawing import LossCurve, Plot, plot_figure, save_pngs, svg
from azeotrope.report.figures import figures
from azeotrope.report.headlines import headline
from azeotrope.report.rows import read_document
from azeotrope.report.summary import plain_words
from azeotrope.report.tables import (
    degeneracy_table,
    other_table,
    percent,
    result_table,
    teacher_table,
    times,
)

TEMPLATE = "page.html.jinja"


EXAMPLES = 12


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

    `curves.json`, `plots.json` and `examples.json` are used if they are there; a section without
    data is left out.

    Returns:
        The path of the page.

    Raises:
        ValueError: if a file is broken or of another schema; the message names it.
    """
    run, rows = read_document(folder / "results.json")
    curves = _optional(folder / "curves.json", LossCurve)
    examples = _optional(folder / "examples.json", Example)
    traces = run.get("traces") if isinstance(run.get("traces"), int) else None
    plots = _optional(folder / "plots.json", Plot)
    drawn = figures(rows, curves, traces) | {plot.name: plot_figure(plot) for plot in plots}
    captions = CAPTIONS | {plot.name: (plot.title, plot.caption) for plot in plots}
    save_pngs(drawn, folder / "figures")
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
        figures=[(name, svg(figure), *captions[name]) for name, figure in drawn.items()],
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
            raise ValueError(
                f"{path} cannot be used: entry {index}: {explain(error, kind)}"
            ) from None
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
