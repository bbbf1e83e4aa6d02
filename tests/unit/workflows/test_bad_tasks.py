"""Tasks that lack problems, or whose rows are broken, are refused before anything loads."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("nothing_starts")
CMI = "name: trial\ndefenses:\n  - {parts: [{name: cmi}], training: {truth: 20}}\n"


def rows(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


GOOD_ROW = json.dumps({"question": "1 + 1?", "answer": "2"})


def test_broken_rows_are_named_by_file_and_line(refused, tmp_path: Path) -> None:
    good = rows(tmp_path / "good.jsonl", GOOD_ROW)
    bad = rows(
        tmp_path / "bad.jsonl", GOOD_ROW, '{"question": ', '{"question": "?"}', "[1]", GOOD_ROW
    )
    message = refused("task.name=jsonl", f"task.train={bad}", f"task.test={good}")
    assert f"{bad}: 3 of 5 rows cannot be used" in message
    assert "line 2 is not JSON" in message
    assert 'line 3 has no "answer" (it has question)' in message
    assert "line 4 is a list" in message
    missing = tmp_path / "missing.jsonl"
    message = refused("task.name=jsonl", f"task.train={missing}", f"task.test={good}")
    assert f"no file {missing}" in message
    assert "one JSON object per line" in message


def test_asking_for_more_problems_than_there_are(refused, tmp_path: Path) -> None:
    few = rows(tmp_path / "few.jsonl", GOOD_ROW, GOOD_ROW, GOOD_ROW)
    message = refused("task.name=jsonl", f"task.train={few}", f"task.test={few}", "traces=5")
    assert "3 problems in train, fewer than the 5 requested" in message


def test_every_problem_that_a_run_asks_for_is_counted(refused, tmp_path: Path) -> None:
    def lacks(counts: dict[str, int], *overrides: str) -> str:
        """What is said when a task has so many problems and no more."""
        for name, count in counts.items():
            lines = [json.dumps({"question": f"{name} {i}?", "answer": "1"}) for i in range(count)]
            rows(tmp_path / f"{name}.jsonl", *lines)
        task = (f"task.{name}={tmp_path / f'{name}.jsonl'}" for name in counts)
        size = ("traces=20", "head_traces=15", "exam_problems=30", "teacher_problems=25")
        floor = "defenses.0.training.floor.problems=20"
        return refused("task.name=jsonl", *task, *size, floor, *overrides, yaml=CMI)

    enough = {"train": 60, "validation": 60, "test": 60}
    found = lacks({**enough, "test": 29})
    assert "29 problems in test, fewer than the 30 requested" in found
    found = lacks({**enough, "validation": 19})
    assert "19 problems in validation, fewer than the 20 requested" in found
    # The attacker has 20 problems, and 20 others with ground truth are needed.
    found = lacks({**enough, "train": 39}, "defenses.0.training.apart=true")
    assert "39 problems in train, fewer than the 40 requested" in found
    # A lesson is always apart, and its exam asks 50 problems.
    lesson = "defenses.0.lesson={traces: 25, attacks: [{name: alpha}]}"
    found = lacks({**enough, "train": 44}, lesson)
    assert "44 problems in train, fewer than the 45 requested" in found
    found = lacks({**enough, "validation": 49}, lesson)
    assert "49 problems in validation, fewer than the 50 requested" in found
    found = lacks({**enough, "validation": 24}, "probe.information=25")
    assert "24 problems in validation, fewer than the 25 requested" in found
    found = lacks({**enough, "validation": 29, "test": 1}, "exam_split=validation")
    assert "29 problems in validation, fewer than the 30 requested" in found


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("defenses.0.training.floor.begun=0.9", "floor.begun: none of the ground truth of 4 valid"),
        ("probe.begun=3", "probe.begun: none of the ground truth of 3 test problems is right"),
    ],
)
def test_answers_are_begun_only_where_the_ground_truth_is_right(
    refused, override: str, said: str
) -> None:
    few = ["traces=20", "exam_problems=20", "teacher_problems=20"]
    few.append("defenses.0.training.floor.problems=4")
    assert said in refused("task.slip=1", *few, override, yaml=CMI)
