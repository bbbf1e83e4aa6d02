"""The end of a run in the terminal: tables that fit its width, the findings, and the report."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from azeotrope.report.paired import read_paired
from azeotrope.report.rows import read_document
from azeotrope.report.summary import plain_words
from azeotrope.report.tables import narrow_result_table, result_table, teacher_table, without

LOG_WIDTH = 160
"""Columns of a log file, which has no width of its own: enough for the widest table."""


def wide_console() -> Console:
    """A console with the width of the terminal, or of `LOG_WIDTH` if the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def print_findings(folder: Path, console: Console) -> None:
    """Print the tables, the sentences and the address of the report of a finished run.

    Raises:
        ValueError: if `results.json` is missing or broken.
    """
    run, rows = read_document(folder / "results.json")
    teachers = teacher_table(rows)
    if any(row.role == "student" for row in rows):
        title = f"{folder.name}: who learned what"
        learned = result_table(rows)
        if _width(learned) <= console.width:
            _print_table(console, title, learned)
        else:
            table, caption = narrow_result_table(rows)
            hidden = {"problems"} if len({row.task for row in rows}) > 1 else {"problems", "task"}
            _print_table(console, title, table, caption)
            _print_table(console, f"{folder.name}: the teacher", without(teachers, hidden))
    else:
        _print_table(console, f"{folder.name}: what the teacher still knows", teachers)
    notes = run.get("notes", ())
    for sentence in (*plain_words(rows, paired=read_paired(run)), *notes):
        console.print(f"- {sentence}", markup=False)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _width(table: Sequence[Sequence[str]]) -> int:
    """Columns that a table takes if no cell is wrapped, borders and padding included."""
    widest = [max(map(len, column)) for column in zip(*table, strict=True)]
    return sum(widest) + 3 * len(widest) + 1


def _print_table(
    console: Console, title: str, table: Sequence[Sequence[str]], caption: str | None = None
) -> None:
    header, *lines = table
    grid = Table(*header, title=title, caption=caption)
    for line in lines:
        grid.add_row(*line)
    console.print(grid)
