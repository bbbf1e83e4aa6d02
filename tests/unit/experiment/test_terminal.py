"""What a run prints at its end, at the widths of a terminal and of a log file."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from azeotrope.report.rows import ResultRow, results_document
from experiment.terminal import LOG_WIDTH, print_findings

NARROW = 80


def row(role: str, value: float, **columns: object) -> ResultRow:
    named = {"role": role, "model": "teacher" if role == "teacher" else "small", "task": "pocket"}
    measured = {"metric": "accuracy", "value": value, "n": 400, "ci95": (0.0, 1.0)}
    return ResultRow.model_validate(named | measured | columns)


def rows() -> list[ResultRow]:
    doge = {"defense": "doge", "strength": 0.25}
    attacks = [{"attack": "text_sft"}, {"attack": "text_sft", "cleanup": "correct_only"}]
    attacks.append({"attack": "forward_kl", "variant": "temperature=4"})
    return [
        row("teacher", 0.9),
        row("teacher", 0.85, **doge),
        row("student", 0.1),
        *(
            row("student", 0.5 - 0.1 * bool(defense), traces=1000, **attack, **defense)
            for defense in ({}, doge)
            for attack in attacks
        ),
        row("student", 0.3, traces=250, attack="sft_only"),
    ]


def printed(folder: Path, measured: list[ResultRow], width: int) -> str:
    document = results_document({"name": "demo", "notes": ["A note."]}, measured)
    (folder / "results.json").write_text(json.dumps(document))
    output = io.StringIO()
    print_findings(folder, Console(file=output, width=width))
    return output.getvalue()


@pytest.mark.parametrize("width", [NARROW, LOG_WIDTH])
def test_no_cell_is_broken_or_cut(width: int, tmp_path: Path) -> None:
    text = printed(tmp_path, rows(), width)
    tables = [line for line in text.splitlines() if line.startswith("│")]
    assert max(map(len, tables)) <= width
    assert "…" not in text
    # Each line of a table has its first cell filled: a wrapped cell would leave it empty.
    assert all(line.split("│")[1].strip() for line in tables)
    for number in ("50.0 % [", "40.0 % [", "90.0 %", "85.0 %"):
        assert any(number in line for line in tables)


def test_a_narrow_table_says_what_it_leaves_out(tmp_path: Path) -> None:
    text = printed(tmp_path, rows(), NARROW)
    assert "student small; 1000 traces; seeds per student: 1" in text
    assert "ground truth only, 250 traces" in text
    assert "doge (0.25), after correct_only" in text
    assert "demo: the teacher" not in text
    assert f"{tmp_path.name}: the teacher" in text


def test_sentences_and_the_report_come_last(tmp_path: Path) -> None:
    text = printed(tmp_path, rows(), LOG_WIDTH)
    assert "- A note." in text
    assert text.rstrip().endswith("report.html")
    only_teacher = [item for item in rows() if item.role == "teacher"]
    assert "what the teacher still knows" in printed(tmp_path, only_teacher, NARROW)
