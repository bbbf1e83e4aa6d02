"""Everything that decides a result is in the name of its stage by content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from azeotrope import models
from experiment import settings
from experiment.display import Display
from experiment.plan import ProblemRange, TraceRequest
from experiment.steps import Steps
from experiment.steps.students import TrainingTexts

ROWS = [{"question": f"{n} and 1 ?", "answer": str(n + 1)} for n in range(20)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A task of one's own, GSM8K's files, and a model."""
    for name in ("train", "test", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    (tmp_path / "gsm8k").mkdir()
    gsm = [{"question": r["question"], "answer": f"so\n#### {r['answer']}"} for r in ROWS]
    for name in ("train", "test"):
        write_rows(tmp_path / "gsm8k" / f"{name}.jsonl", gsm)
    shutil.copytree(models.resolve("pocket/small"), tmp_path / "model")
    return tmp_path


def keys(folder: Path, task: str) -> tuple[str, str, str]:
    """The names of a stage of traces, of ground truth, and of a student."""
    own = {name: str(folder / f"{name}.jsonl") for name in ("train", "test", "validation")}
    tasks = {
        "jsonl": {"name": "jsonl", **own},
        "gsm8k": {"name": "gsm8k", "path": str(folder / "gsm8k"), "validation": 4},
    }
    config = settings.load(
        "pocket_demo",
        [
            f"task={json.dumps(tasks[task])}",
            f"teacher={folder / 'model'}",
            f"students=[{{name: small, model: {folder / 'model'}}}]",
            f"cache={folder / 'cache'}",
        ],
    )
    steps = Steps.of(config, Display())
    problems = ProblemRange("train", 4)
    traces = steps.traces.stage_of(TraceRequest(config.teacher, "t", problems, config.sampling))
    truth = steps.traces.ground_truth(problems)
    student = steps.students.plan(config.students[0], TrainingTexts(traces, 4), 0, "x").stage
    return traces.key, truth.key, student.key


def edit_train(folder: Path) -> None:
    write_rows(folder / "train.jsonl", [*ROWS[:-1], {"question": "other ?", "answer": "3"}])


def edit_test(folder: Path) -> None:
    write_rows(folder / "test.jsonl", [{"question": "other ?", "answer": "3"}, *ROWS[1:]])


def edit_gsm8k(folder: Path) -> None:
    path = folder / "gsm8k" / "train.jsonl"
    path.write_text(path.read_text().replace("19 and 1", "91 and 1"))


def edit_template(folder: Path) -> None:
    path = folder / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def edit_tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def edit_generation(folder: Path) -> None:
    path = folder / "model" / "generation_config.json"
    path.write_text(path.read_text().replace('"eos_token_id": 2', '"eos_token_id": [2, 3]'))


TASK = {"jsonl": (edit_train, edit_test), "gsm8k": (edit_gsm8k,)}
MODEL = (edit_template, edit_tokenizer, edit_generation)


@pytest.mark.parametrize(
    ("task", "edit"), [(task, edit) for task, edits in TASK.items() for edit in edits]
)
def test_an_edited_task_is_another_stage(
    inputs: Path, task: str, edit: Callable[[Path], None]
) -> None:
    before = keys(inputs, task)
    assert keys(inputs, task) == before
    edit(inputs)
    assert all(a != b for a, b in zip(keys(inputs, task), before, strict=True))


@pytest.mark.parametrize("edit", MODEL)
def test_an_edited_model_is_another_stage(inputs: Path, edit: Callable[[Path], None]) -> None:
    before = keys(inputs, "jsonl")
    edit(inputs)
    traces, truth, student = keys(inputs, "jsonl")
    assert (traces != before[0], student != before[2]) == (True, True)
    assert truth == before[1]
