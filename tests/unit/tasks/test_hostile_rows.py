"""Rows that are JSON of a kind, and files that are text of a kind, are refused by line."""

from pathlib import Path

import pytest

from azeotrope.tasks.jsonl import parse
from azeotrope.tasks.rows import read


def rows(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", "line 1 holds NaN, which is no number"),
        ("-Infinity", "line 1 holds -Infinity"),
        ("1e400", "line 1 holds 1e400, which is too large"),
        ('"\\ud800"', "line 1 holds half of a surrogate pair"),
        ("[" * 100_000 + "]" * 100_000, "line 1 is nested too deeply"),
    ],
)
def test_answers_that_are_no_answers(tmp_path: Path, value: str, message: str) -> None:
    path = rows(tmp_path, f'{{"question": "q", "answer": {value}}}\n'.encode())
    with pytest.raises(ValueError, match=message):
        read(path, parse, expected="rows")


def test_a_file_in_utf_16_is_named_as_such(tmp_path: Path) -> None:
    path = rows(tmp_path, '{"question": "q", "answer": "1"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match="is not UTF-8 but UTF-16; save it as UTF-8"):
        read(path, parse, expected="rows")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = rows(tmp_path, '{"question": "q", "answer": "1"}\n'.encode("utf-8-sig"))
    assert read(path, parse, expected="rows")[0].answer == "1"
