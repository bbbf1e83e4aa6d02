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
from azeotrope.report.paired import read_paired
from azeotrope.report.rows import ResultRow, read_document
from azeotrope.report.summary import plain_words
from azeotrope.report.tables import (
    best_table,
    degeneracy_table,
    headline_table,
    other_table,
    result_table,
    teacher_table,
)

TEMPLATE = "page.html.jinja"
EXAMPLES = 12
CAPTIONS = {
    "utility_vs_gain": (
        "What users keep against what the attacker loses",
        "Each point is one student, defense and attack. Right is better for users, up is better "
        "for the provider; at 0 % gain removed the defense does nothing. Bars are 95 % intervals.",
    ),
    "budget_curve": (
        "Student accuracy against observed traces",
        "Means over seeds with 95 % bands. The price multiplier says how many times as many "
        "defended traces an attacker needs for the accuracy that clean ones give.",
    ),
    "students": (
        "Accuracy of every student",
        "Means over seeds with 95 % intervals over seeds and problems, or over problems only where "
        "there is one seed. Paler bars are attacks with "
        "clean-ups or variants.",
    ),
    "loss_curves": (
        "Training loss",
        "Nats per token at each logged step. Where there are many curves, those of one defense and "
        "attack share a colour.",
    ),
}


class TraceExample(Config):
    """One entry of `examples.json`: a question with its clean and its defended trace."""

    question: str
    answer: str
    clean: str
    defended: str
    defense: str


class TextPiece(NamedTuple):
    """A stretch of text, and whether the text beside it lacks these words."""

    text: str
    changed: bool


def word_changes(clean: str, defended: str) -> tuple[list[TextPiece], list[TextPiece]]:
    """Both texts in pieces; a piece is marked if the other text lacks its words at this point.

    Joining the pieces gives each text back.
    """
    clean_words, defended_words = (re.findall(r"\S+\s*|\s+", text) for text in (clean, defended))
    before: list[TextPiece] = []
    after: list[TextPiece] = []
    # Words are compared without the space behind them, so that line breaks make no difference.
    matcher = difflib.SequenceMatcher(
        None,
        [word.rstrip() for word in clean_words],
        [word.rstrip() for word in defended_words],
        autojunk=False,
    )
    for kind, a, b, c, d in matcher.get_opcodes():
        for pieces, words in ((before, clean_words[a:b]), (after, defended_words[c:d])):
            if words:
                pieces.append(TextPiece("".join(words), kind != "equal"))
    return before, after


def write_report(folder: Path) -> Path:
    """Write `report.html` and `figures/*.png` beside `results.json`.

    `curves.json`, `plots.json` and `examples.json` are used if they exist; a section without data
    is left out.

    Returns:
        The path of the page.

    Raises:
        ValueError: if a file is broken or of another schema; the message names it.
    """
    run, rows = read_document(folder / "results.json")
    traces = run.get("traces") if isinstance(run.get("traces"), int) else None
    curves = _read_list(folder / "curves.json", LossCurve)
    plots = _read_list(folder / "plots.json", Plot)
    drawn = figures(rows, curves, traces) | {plot.name: plot_figure(plot) for plot in plots}
    captions = CAPTIONS | {plot.name: (plot.title, plot.caption) for plot in plots}
    save_pngs(drawn, folder / "figures")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        **_facts(run, rows, traces),
        **_examples(folder),
        figures=[(name, svg(figure), *captions[name]) for name, figure in drawn.items()],
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _facts(run: dict[str, Any], rows: list[ResultRow], traces: int | None) -> dict[str, Any]:
    """The words and tables of the page."""
    headlines = headline(rows, traces)
    return {
        "run": {key: _plain(value) for key, value in run.items()},
        "title": run.get("name") or "Results",
        "words": [*plain_words(rows, traces, read_paired(run)), *_texts(run.get("notes"))],
        "best": best_table(headlines),
        "headlines": headline_table(headlines),
        "table": result_table(rows, traces),
        "teachers": teacher_table(rows),
        "degeneracy": degeneracy_table(rows, traces),
        "further": other_table(rows),
    }


def _examples(folder: Path) -> dict[str, Any]:
    """The first traces side by side, and how many there are."""
    examples = _read_list(folder / "examples.json", TraceExample)
    pairs = [(item, *word_changes(item.clean, item.defended)) for item in examples[:EXAMPLES]]
    return {"examples": pairs, "example_count": len(examples)}


def _read_list(path: Path, kind: type[C]) -> list[C]:
    """The entries of a file beside `results.json`; none if there is no such file."""
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list, got {type(entries).__name__}")
    validated = []
    for index, entry in enumerate(entries):
        try:
            validated.append(kind.model_validate(entry))
        except ValidationError as error:
            raise ValueError(
                f"{path} cannot be used: entry {index}: {explain(error, kind)}"
            ) from None
    return validated


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
