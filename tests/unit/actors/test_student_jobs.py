"""A student job that runs in this process: what it learns from logits, and the files it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import students
from actors.students import StudentJob
from azeotrope import models, tasks
from azeotrope.attacks import base as attacks
from azeotrope.attacks.logits.attack import LogitAttack
from azeotrope.generation import Sampling
from azeotrope.heads.export import head_from, put_head
from azeotrope.heads.features import compute, write_features
from azeotrope.tokens import Boundary, encode
from azeotrope.traces import ground_truth, read_traces, write_traces

TEXTS, STEPS = 8, 6
TASK = tasks.PocketConfig(slip=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, the clean trunk's states on them, and a defended teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    task = tasks.build(TASK)
    truth = ground_truth(task, task.problems("train", TEXTS))
    write_traces(folder / "texts/0.parquet", truth)
    teacher = models.load("pocket/teacher", device="cpu")
    examples = [
        encode(
            teacher.tokenizer, task.messages(trace.question), trace.text,
            boundary=Boundary(), max_length=160, id=trace.id,
        )
        for trace in truth
    ]  # fmt: skip
    write_features(folder / "features/teacher/0.parquet", compute(teacher.model, examples))
    head = head_from(teacher)
    with torch.no_grad():
        # A matrix on the logits that a linear map undoes.
        turn = 0.3 * torch.randn(129, 129, generator=torch.Generator().manual_seed(1)) / 129**0.5
        head.weight.copy_(head.weight + turn @ head.weight)
    put_head(teacher, head)
    models.save(teacher, folder / "defended")
    return folder


def described(inputs: Path, attack: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return StudentJob.model_validate(
        {
            "model": models.resolve("pocket/small"),
            "name": "small",
            "attack": {**attack, "fit": {"steps": STEPS, "batch_size": 4, "log_every": 1}},
            "traces": str(inputs / "texts"),
            "take": TEXTS,
            "boundary": Boundary(),
            "task": TASK,
            "exam_problems": 3,
            "exam": Sampling(temperature=0.0, max_new_tokens=40),
            "seed": 5,
            "teacher": models.resolve("pocket/teacher"),
            "features": str(inputs / "features"),
            **changes,
        }
    ).dump()


def taught(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    students.run(job, folder, folder / "state", rank=0, progress=lambda *_: None)
    return json.loads((folder / "student.json").read_text())


def losses(about: dict[str, Any]) -> list[float]:
    return [loss for _, loss in about["log"]]


FORWARD_KL = {"name": "forward_kl", "kd_weight": 1.0}


@pytest.mark.parametrize("model", ["pocket/small", "pocket/other"])
@pytest.mark.parametrize(
    "attack", [FORWARD_KL, {"name": "alphanet"}, {"name": "forward_kl", "view": {"top_k": 5}}]
)
def test_an_attacker_learns_from_logits(
    attack: dict[str, Any], model: str, inputs: Path, tmp_path: Path
) -> None:
    job = described(inputs, attack, model=models.resolve(model))
    about = taught(job, tmp_path)
    found = losses(about)
    assert len(found) == STEPS
    assert sum(found[-2:]) < sum(found[:2])
    assert (about["kept"], about["steps"]) == (TEXTS, STEPS)
    exam = read_traces(tmp_path / "exam.parquet")
    assert [trace.problem for trace in exam] == [
        problem.id for problem in tasks.build(TASK).problems("test", 3)
    ]
    before = models.load(model, device="cpu").model.state_dict()
    after = models.load(str(tmp_path / "student"), device="cpu").model.state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(value, after[name]) for name, value in before.items())


def test_the_first_step_is_the_attacks_own_loss(inputs: Path, tmp_path: Path) -> None:
    job = described(inputs, FORWARD_KL)
    job["attack"]["fit"]["batch_size"] = TEXTS
    found = losses(taught(job, tmp_path))[0]
    # All texts are in the first batch, so their order does not count.
    attack = attacks.resolve(job["attack"])
    assert isinstance(attack, LogitAttack)
    student = models.load("pocket/small", device="cpu")
    attack.attach(students._teacher_head(StudentJob(**job), attack, student.device), student)
    texts = read_traces(inputs / "texts")
    lessons = attack.examples(student, texts, tasks.build(TASK), Boundary())
    total, count, _ = attack.loss(student, lessons)
    assert found == pytest.approx(float(total.detach()) / count, rel=1e-5)
    # By hand: KL of the whole teacher's distributions to the whole student's.
    teacher = models.load("pocket/teacher", device="cpu")
    expected, tokens = 0.0, 0
    for lesson in lessons:
        ids = torch.tensor([lesson.example.prompt + lesson.example.completion])
        first = len(lesson.example.prompt) - 1
        with torch.no_grad():
            log_p, log_q = (
                which.model(input_ids=ids).logits[0, first:-1].double().log_softmax(-1)
                for which in (teacher, student)
            )
        expected += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(lesson.example.completion)
    assert found == pytest.approx(expected / tokens, rel=1e-4)


def test_the_named_teacher_is_the_one_that_is_queried(inputs: Path, tmp_path: Path) -> None:
    clean = losses(taught(described(inputs, FORWARD_KL), tmp_path / "clean"))
    job = described(inputs, FORWARD_KL, teacher=str(inputs / "defended"))
    defended = losses(taught(job, tmp_path / "defended"))
    assert abs(defended[0] - clean[0]) > 0.01
    # An attacker with pairs of clean and defended logits sees the clean ones.
    undone = taught(
        described(
            inputs,
            {**FORWARD_KL, "pairs": 300},
            teacher=str(inputs / "defended"),
            snapshot=models.resolve("pocket/teacher"),
        ),
        tmp_path / "undone",
    )
    assert losses(undone) == pytest.approx(clean, rel=0.02)


def test_a_killed_student_ends_the_same(inputs: Path, tmp_path: Path) -> None:
    job = described(inputs, FORWARD_KL)
    job["attack"]["fit"]["checkpoint_every"] = 2
    expected = taught(job, tmp_path / "straight")

    def die(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        students.run(job, folder, folder / "state", rank=0, progress=die)
    found = taught(job, folder)
    assert found["log"] == expected["log"]
    one, two = (
        models.load(str(tmp_path / name / "student"), device="cpu").model.state_dict()
        for name in ("straight", "killed")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("missing", ["teacher", "features"])
def test_an_attack_on_logits_needs_a_teacher(missing: str, inputs: Path, tmp_path: Path) -> None:
    job = described(inputs, FORWARD_KL, **{missing: None})
    with pytest.raises(ValueError, match="forward_kl sees logits, but the job names no teacher"):
        taught(job, tmp_path)


def test_a_text_that_was_not_scored_is_named(inputs: Path, tmp_path: Path) -> None:
    task = tasks.build(TASK)
    other = ground_truth(task, task.problems("train", 2, skip=TEXTS))
    write_traces(tmp_path / "other/0.parquet", other)
    job = described(inputs, FORWARD_KL, traces=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"was not asked about trace {other[0].id}"):
        taught(job, tmp_path / "out")
