"""What a Ray Train worker does to train a student on stolen traces, and to examine it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from azeotrope import models
from azeotrope.attacks import base as attacks
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.attacks.cleanups.base import AttackerAssets, CleanupSpec
from azeotrope.attacks.logits import LogitAttack, TeacherHead
from azeotrope.collect import collect
from azeotrope.config import Config
from azeotrope.files import write_json
from azeotrope.generation import Sampling
from azeotrope.heads.features import read_features
from azeotrope.tasks import TaskConfig
from azeotrope.tasks import build as build_task
from azeotrope.tasks.base import Problem
from azeotrope.tokens import Boundary
from azeotrope.traces import Trace, read_traces, write_traces
from azeotrope.training import fit

EXAM_BATCH = 250


class Lora(Config):
    """Low-rank adapters, merged before the student is saved (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class StudentJob(Config):
    """Everything that decides a trained student and its exam."""

    model: str
    name: str
    lora: Lora | None = None
    attack: dict[str, Any]
    cleanup: CleanupSpec = "none"
    traces: str
    take: int
    boundary: Boundary
    task: TaskConfig
    exam_problems: int
    exam: Sampling
    seed: int
    save_weights: bool = True
    exam_split: str = "test"
    teacher: str | None = Field(
        default=None, description="whose logits are given, for attacks that see them"
    )
    features: str | None = Field(
        default=None, description="that teacher's hidden states on the stolen texts"
    )
    snapshot: str | None = Field(
        default=None, description="an undefended teacher of which the thief has some logits"
    )


def run(
    data: dict[str, Any],
    folder: Path,
    state: Path,
    *,
    rank: int,
    progress: Callable[[int, int], None],
) -> None:
    """Train, write the exam's traces, the weights if asked, and last of all `student.json`."""
    started = time.perf_counter()
    job = StudentJob.model_validate(data)
    task = build_task(job.task)
    attack = attacks.resolve(job.attack)
    # What is trained is float32 everywhere: steps are smaller than what bfloat16 tells apart.
    student = models.load(job.model, dtype=torch.float32 if job.lora is None else None)
    if job.lora is not None:
        student = models.attach_lora(student, job.lora.rank, job.lora.alpha, job.lora.dropout)
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    stolen = read_traces(Path(job.traces))[: job.take]
    cleanup = cleanups.resolve(job.cleanup)
    cleaned = cleanup.clean(stolen, job.boundary, AttackerAssets(base_student=job.model))
    if not cleaned.traces:
        raise ValueError(
            f"clean-up {cleanup.label!r} left none of {len(stolen)} traces; there is nothing to "
            "learn from"
        )
    if isinstance(attack, LogitAttack):
        attack.attach(_teacher_head(job, attack, student.device), student)
    config = attack.config.fit.model_copy(update={"seed": job.seed})
    student.model.train()
    result = fit(
        [parameter for parameter in student.model.parameters() if parameter.requires_grad],
        attack.examples(student, cleaned.traces, task, job.boundary),
        lambda items: attack.loss(student, items),
        config,
        checkpoint=state,
        on_step=lambda entry: progress(entry.step, config.steps),
        identify=lambda example: example.id,
    )
    if rank != 0:
        return
    student.model.eval()
    if job.lora is not None:
        student = models.merge_lora(student)
    problems = task.problems(job.exam_split, job.exam_problems)
    exam = examine(student, task, problems, job.exam, job.name)
    write_traces(folder / "exam.parquet", exam)
    if job.save_weights:
        models.save(student, folder / "student")
    described = {
        "kept": len(cleaned.traces),
        "cost": asdict(cleaned.cost),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(time.perf_counter() - started, 2),
        "log": [[entry.step, entry.loss] for entry in result.log],
    }
    write_json(folder / "student.json", described)


def _teacher_head(job: StudentJob, attack: LogitAttack, device: torch.device) -> TeacherHead:
    """What the thief may ask: hidden states stand in for the trunk that made them.

    Raises:
        ValueError: if the job names no teacher or no features.
    """
    if job.teacher is None or job.features is None:
        raise ValueError(f"{attack.config.name} sees logits, but the job names no teacher to ask")
    whole = models.load(job.teacher, device=device)
    head = models.head_of(whole.model)
    snapshot = None
    if job.snapshot is not None:
        other = models.head_of(models.load(job.snapshot, device=device).model)
        snapshot = other.weight.detach(), other.bias
    return TeacherHead(
        whole.tokenizer,
        head.weight,
        head.bias,
        read_features(Path(job.features) / "teacher"),
        snapshot=snapshot,
        model=whole.model if attack.needs == "teacher" else None,
    )


def examine(
    loaded: models.Loaded, task: Any, problems: Sequence[Problem], sampling: Sampling, name: str
) -> list[Trace]:
    """Answers to held-out problems, a bounded number at a time."""
    found: list[Trace] = []
    for start in range(0, len(problems), EXAM_BATCH):
        part = problems[start : start + EXAM_BATCH]
        found += collect(loaded, task, part, sampling, model=name)
    return found
