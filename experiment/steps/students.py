"""Students: attackers' models that learn from traces or logits, and take the exam."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.students import StudentJob
from azeotrope import models
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.attacks.cleanups.base import NO_CLEANUP, CleanupSpec
from experiment.settings import StudentConfig
from experiment.stages import Stage
from experiment.steps.context import StepContext
from experiment.steps.trainings import PlannedTraining, train


@dataclass(frozen=True)
class TrainingTexts:
    """What a student is trained on: the first traces of a stage, after a clean-up."""

    stage: Stage
    count: int
    cleanup: CleanupSpec = NO_CLEANUP


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's side of an attack on logits."""

    teacher: str
    """The checkpoint whose logits the attacker sees."""
    features: Stage
    """Its hidden states on the student's training texts."""
    snapshot: str | None = None
    """An undefended checkpoint of which the attacker has some logits."""


class StudentSteps:
    """Plans and trains students."""

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def plan(
        self,
        student: StudentConfig,
        texts: TrainingTexts,
        seed: int,
        label: str,
        *,
        attack: dict[str, Any] | None = None,
        logits: TeacherLogits | None = None,
    ) -> PlannedTraining:
        """The training of one student and its exam; nothing is trained yet.

        Args:
            label: what the student learns from, for the progress bar.
            attack: settings of the attack; None takes the experiment's main attack.
            logits: for attacks on logits.
        """
        context, config = self._context, self._context.config
        job = StudentJob(
            model=models.resolve(student.model),
            name=student.name,
            lora=student.lora,
            attack=attack or config.attack,
            cleanup=texts.cleanup,
            traces=str(texts.stage.path),
            take=texts.count,
            boundary=config.boundary,
            task=config.task,
            exam_problems=config.exam_problems,
            exam_split=config.exam_split,
            exam=config.greedy,
            seed=seed,
            save_weights=config.save_students,
            teacher=logits and models.resolve(logits.teacher),
            features=logits and str(logits.features.path),
            snapshot=logits and logits.snapshot and models.resolve(logits.snapshot),
        )
        # Paths differ between machines, so that the description holds what lies at them.
        contents: dict[str, Any] = {
            "task": config.task.described(),
            "model": context.fingerprint(student.model),
            "traces": texts.stage.key,
        }
        if logits is not None:
            contents["teacher"] = context.fingerprint(logits.teacher)
            contents["features"] = logits.features.key
            if logits.snapshot is not None:
                contents["snapshot"] = context.fingerprint(logits.snapshot)
        stage = context.cache.stage("student", **{**job.dump(), **contents})
        cleaned = cleanups.resolve(texts.cleanup).label
        words = f"{student.name}, {label}, {texts.count} traces, {cleaned}, seed {seed}"
        return PlannedTraining(stage, job.dump(), words)

    def train(self, planned: Sequence[PlannedTraining]) -> None:
        """Train students one after another in one Ray Train run.

        Raises:
            TrainingError: if a training is at fault, or workers failed too often.
            StoppedError: if the run is ending.
        """
        train(self._context, "student", planned)
