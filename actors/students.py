"""What a Ray Train worker does: train a student on an attacker's traces, and examine it."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from azeotrope import models
from azeotrope.attacks import base as attacks
from azeotrope.attacks.base import Attack, longest
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.attacks.cleanups.base import AttackerAssets, CleanedTraces, CleanupSpec
from azeotrope.attacks.logits.attack import LogitAttack
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.collect import SHARD, Origin, collect
from azeotrope.config import Config
from azeotrope.files import write_json
from azeotrope.generation import Sampling
from azeotrope.heads.features import read_features
from azeotrope.logits.served import check_served, check_uncapped
from azeotrope.tasks import TaskConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import Boundary
from azeotrope.traces import DroppedTraces, Trace, fitting, read_traces, write_traces
from azeotrope.training import fit


class Lora(Config):
    """Low-rank adapters, merged before the student is saved (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class StudentJob(Config):
    """Everything that a trained student and its exam depend on."""

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
        default=None, description="checkpoint whose logits are observed, for attacks that see them"
    )
    features: str | None = Field(
        default=None, description="folder of that teacher's hidden states on the traces"
    )
    snapshot: str | None = Field(
        default=None, description="undefended checkpoint, some of whose logits the attacker has"
    )


def run(
    data: dict[str, Any],
    folder: Path,
    state: Path,
    *,
    rank: int,
    progress: Callable[[int, int], None],
) -> None:
    """Train, write the exam's traces and the weights, and last of all `student.json`.

    Args:
        data: a `StudentJob` as plain data.
        folder: where the results are written.
        state: where an interrupted training is resumed from.
        rank: of this worker; only the first one writes results.
        progress: called with the steps done and the steps in all.

    Raises:
        ValueError: if no trace is left, or the job does not fit its attack.
        ArithmeticError: if the loss or a gradient is not finite.
    """
    started = time.perf_counter()
    job = StudentJob.model_validate(data)
    task = build_task(job.task)
    attack = attacks.resolve(job.attack)
    student = _untrained(job)
    cleaned = _cleaned(job)
    if isinstance(attack, LogitAttack):
        attack.attach(_teacher_head(job, attack, student.device), student)
    traces, dropped = _learned_traces(job, attack, cleaned.traces, student)
    config = attack.config.fit.model_copy(update={"seed": job.seed})
    student.model.train()
    result = fit(
        [parameter for parameter in student.model.parameters() if parameter.requires_grad],
        attack.examples(student, traces, task, job.boundary),
        lambda examples: attack.loss(student, examples),
        config,
        checkpoint=state,
        on_step=lambda entry: progress(entry.step, config.steps),
        identify=lambda example: example.id,
    )
    if rank != 0:
        return
    student.model.eval()
    student = models.merge_lora(student) if job.lora is not None else student
    problems = task.problems(job.exam_split, job.exam_problems)
    exam = collect(student, task, problems, job.exam, origin=Origin(model=job.name), shard=SHARD)
    write_traces(folder / "exam.parquet", exam)
    if job.save_weights:
        models.save(student, folder / "student")
    described = {
        "kept": len(traces),
        "dropped": dropped._asdict(),
        "cost": asdict(cleaned.cost),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(time.perf_counter() - started, 2),
        "log": [[entry.step, entry.loss] for entry in result.log],
    }
    write_json(folder / "student.json", described)


def _untrained(job: StudentJob) -> models.Loaded:
    """The student before training; all that will be trained is in float32.

    A step of training is often smaller than the difference of two neighbouring bfloat16 numbers.
    """
    student = models.load(job.model, dtype=torch.float32 if job.lora is None else None)
    check_served(student.model)
    if job.lora is None:
        return student
    student = models.attach_lora(student, job.lora.rank, job.lora.alpha, job.lora.dropout)
    for parameter in student.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return student


def _cleaned(job: StudentJob) -> CleanedTraces:
    """The attacker's traces after the clean-up."""
    collected = read_traces(Path(job.traces))[: job.take]
    cleanup = cleanups.resolve(job.cleanup)
    cleaned = cleanup.clean(collected, job.boundary, AttackerAssets(base_student=job.model))
    if not cleaned.traces:
        raise ValueError(
            f"clean-up {cleanup.label!r} left none of {len(collected)} traces; there is nothing to "
            "learn from"
        )
    return cleaned


def _learned_traces(
    job: StudentJob, attack: Attack, traces: list[Trace], student: models.Loaded
) -> tuple[list[Trace], DroppedTraces]:
    """The traces that fit the student, and how many do not.

    Raises:
        ValueError: if none is left.
    """
    limit = longest(attack.config, student)
    kept, dropped = fitting(
        traces,
        student.tokenizer,
        build_task(job.task),
        job.boundary,
        limit,
        drops_long=attack.config.too_long == "drop",
    )
    if not kept:
        raise ValueError(
            f"none of {len(traces)} traces can be learned from: {dropped.empty} are empty and "
            f"{dropped.too_long} are longer than {limit} tokens; raise attack.max_length, or look "
            "at what defenses and clean-ups leave"
        )
    return kept, dropped


def _teacher_head(job: StudentJob, attack: LogitAttack, device: torch.device) -> TeacherHead:
    """What the attacker can query: hidden states stand in for the layers that computed them.

    Raises:
        ValueError: if the job names no teacher or no features.
    """
    if job.teacher is None or job.features is None:
        raise ValueError(
            f"{attack.config.label} sees logits, but the job names no teacher to query"
        )
    teacher = models.load(job.teacher, device=device)
    check_uncapped(teacher.model, "teacher")
    head = models.head_of(teacher.model)
    snapshot = None
    if job.snapshot is not None:
        undefended = models.head_of(models.load(job.snapshot, device=device).model)
        snapshot = undefended.weight.detach(), undefended.bias
    return TeacherHead(
        teacher.tokenizer,
        head.weight,
        head.bias,
        read_features(Path(job.features) / "teacher"),
        snapshot=snapshot,
        model=teacher.model if attack.needs == "teacher" else None,
    )
