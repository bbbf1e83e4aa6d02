"""Defended heads, trained from stored features."""

from collections.abc import Sequence
from typing import Any

from actors.heads import HeadJob
from azeotrope import models
from azeotrope.heads.search import HeadTraining
from experiment.stages import Stage
from experiment.steps.context import StepContext
from experiment.steps.trainings import PlannedTraining, train


class HeadSteps:
    """Trains heads; each is exported as a plain checkpoint in `teacher/` of its stage."""

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def train(
        self,
        features: Sequence[Stage],
        teacher: str,
        proxies: tuple[str, ...],
        defense: dict[str, Any],
        training: HeadTraining,
        *,
        keeps_floor: bool = True,
    ) -> Stage:
        """Train the head of a teacher with one defense.

        Args:
            keeps_floor: whether the head that training starts from is known to hold the floor.

        Raises:
            TrainingError: if the training is at fault, or workers failed too often.
        """
        context, config = self._context, self._context.config
        job = HeadJob(
            teacher=models.resolve(teacher),
            clean=models.resolve(config.teacher),
            proxies=tuple(models.resolve(name) for name in proxies),
            defense=defense,
            training=training,
            features=tuple(str(stage.path) for stage in features),
            task=config.task,
            max_new_tokens=config.sampling.max_new_tokens,
            shard=config.shard,
            keeps_floor=keeps_floor,
        )
        # Paths differ between machines, so that the description holds what lies at them.
        contents = {
            "task": config.task.described(),
            "teacher": context.fingerprint(teacher),
            "clean": context.fingerprint(config.teacher),
            "proxies": [context.fingerprint(name) for name in proxies],
            "features": [stage.key for stage in features],
        }
        stage = context.cache.stage("head", **{**job.dump(), **contents})
        train(context, "head", [PlannedTraining(stage, job.dump(), f"head: {defense['name']}")])
        return stage
