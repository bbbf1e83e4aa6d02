"""What is written beside the rows: a table for spreadsheets, and notes that explain them."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

from azeotrope.report.intervals import Estimate
from azeotrope.report.rows import ResultRow
from azeotrope.report.tables import percent
from experiment import results
from experiment.settings import DefenseChoice
from experiment.stages import Stage
from experiment.teachers import TeacherResult

STAGE = Stage("traces", "k", Path("nowhere"), {})


def test_every_row_is_a_line_of_the_csv(tmp_path: Path) -> None:
    rows = [
        ResultRow(
            role="student", model="small", metric="accuracy", value=0.5, n=10, ci95=(0.2, 0.8),
            seconds=1.0, task="t, with a comma", seed=seed, traces=4, settings={"attack": {"a": 1}},
        )
        for seed in (0, 1)
    ]  # fmt: skip
    results.write_csv(tmp_path / "results.csv", rows)
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["seed"] for line in lines] == ["0", "1"]
    assert lines[0]["task"] == "t, with a comma"
    assert json.loads(lines[0]["settings"]) == {"attack": {"a": 1}}
    assert json.loads(lines[0]["ci95"]) == [0.2, 0.8]


class Searched(TeacherResult):
    """A teacher whose search ended with another strength than the settings ask for."""

    @property
    def strength(self) -> float:
        return 0.25


def test_a_strength_that_the_search_changed_is_explained() -> None:
    choice = DefenseChoice(parts=({"name": "doge", "strength": 0.2},))
    changed = Searched(choice, STAGE, STAGE, STAGE, heads=(STAGE,))
    same = replace(changed, choice=DefenseChoice(parts=({"name": "doge", "strength": 0.25},)))
    [note] = results.strength_notes([changed, same])
    assert note.startswith("doge: the settings ask for strength 0.2; ")
    assert "ended with 0.25" in note


def test_a_share_of_nothing_is_not_determined() -> None:
    assert percent(Estimate(2.0, -math.inf, math.inf)) == "not determined"
    assert percent(Estimate(0.5, 0.25, math.inf)) == "50.0 % [25.0, no limit]"
