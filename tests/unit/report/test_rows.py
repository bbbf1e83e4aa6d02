"""Rows of results: written and read back, and read from files of schema 1."""

import json
from pathlib import Path
from typing import Any

import pytest

from azeotrope.report.rows import AttackCost, ResultRow, read_document, results_document

SCHEMA_1_ROW = {
    "role": "student", "model": "small", "defense": "cmi", "strength": 0.1, "attack": "forward_kl",
    "cleanup": "none", "decoding": "greedy", "traces": 1000, "task": "pocket-v1",
    "metric": "accuracy", "value": 0.8, "n": 10, "ci95": [0.49, 0.943], "seed": 0, "seconds": 2.5,
}  # fmt: skip


def row(**changes: object) -> ResultRow:
    columns = {"role": "student", "model": "small", "task": "pocket", "metric": "accuracy"}
    measured = {"value": 0.8, "n": 10, "ci95": [0.49, 0.943]}
    return ResultRow.model_validate(columns | measured | changes)


def write(path: Path, schema: int, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"schema": schema, "run": {}, "rows": rows}))
    return path


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    settings = {"attack": {"name": "forward_kl", "fit": {"steps": 3}}, "defense": [{"name": "cmi"}]}
    rows = [
        row(),
        row(seed=3, strength=0.5, defense="doge", traces=512, cleanup="digits"),
        row(attack="forward_kl", variant="pairs=8", settings=settings),
        row(cost=AttackCost(queries=4, tokens=120, seconds=1.5)),
    ]
    path = tmp_path / "results.json"
    document = results_document({"name": "demo"}, rows)
    path.write_text(json.dumps(document))
    assert read_document(path) == ({"name": "demo"}, rows)
    assert document["schema"] == 2
    assert document["rows"][0]["cost"] is None
    assert document["rows"][3]["cost"] == {"queries": 4, "tokens": 120, "seconds": 1.5}
    assert document["rows"][2]["settings"] == settings


@pytest.mark.parametrize(
    ("cleanup", "variant_and_cleanup"),
    [
        ("none", ("none", "none")),
        ("correct_only", ("none", "correct_only")),
        ("drop_reasoning", ("none", "drop_reasoning")),
        ("digits", ("none", "digits")),
        ("pairs=8", ("pairs=8", "none")),
        ("top_k=5", ("top_k=5", "none")),
    ],
)
def test_schema_1_gives_up_the_variants_in_its_cleanup_column(
    cleanup: str, variant_and_cleanup: tuple[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path / "results.json", 1, {**SCHEMA_1_ROW, "cleanup": cleanup})
    (read,) = read_document(path)[1]
    assert (read.variant, read.cleanup) == variant_and_cleanup
    # Every other column is as it was, and what schema 1 did not record stays unknown.
    added = {"variant", "cleanup", "settings", "cost"}
    assert {key: value for key, value in read.dump().items() if key not in added} == {
        key: value for key, value in SCHEMA_1_ROW.items() if key != "cleanup"
    }
    assert (read.settings, read.cost) == ({}, None)


def test_schema_2_keeps_any_label_of_a_cleanup(tmp_path: Path) -> None:
    data = {**SCHEMA_1_ROW, "cleanup": "digits+paraphrase=2"}
    (read,) = read_document(write(tmp_path / "results.json", 2, data))[1]
    assert (read.variant, read.cleanup) == ("none", "digits+paraphrase=2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no schema version"),
        ('{"schema": 3, "run": {}, "rows": []}', "schema 3; this version reads schemas 1 and 2"),
        ('{"schema": 1, "run": {}}', "a list 'rows'"),
        ('{"schema": 1, "run": {}, "rows": [{"role": "owner"}]}', "row 0: role"),
        ('{"schema": 1, "run": {}, "rows": [7]}', "row 0: row"),
        ('{"schema": 2, "run": {}, "rows": [{"role": "owner"}]}', "row 0: role"),
    ],
)
def test_broken_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_document(path)


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no results at .*results\.json"):
        read_document(tmp_path / "results.json")
