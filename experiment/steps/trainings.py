"""Training runs: heads or students that are trained one after another by Ray Train."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors import trainer
from azeotrope.config import digest
from experiment.stages import Stage
from experiment.steps.complete import IncompleteStageError
from experiment.steps.context import StepContext


@dataclass(frozen=True)
class PlannedTraining:
    """A training that has not run yet, and the stage that it will fill."""

    stage: Stage
    job: dict[str, Any]
    label: str
    """What the progress bar says."""

    @property
    def task(self) -> trainer.TrainingTask:
        return trainer.TrainingTask(self.label, self.job, str(self.stage.partial))


def train(context: StepContext, kind: trainer.Kind, planned: Sequence[PlannedTraining]) -> None:
    """Run the trainings whose stages do not exist yet.

    Raises:
        TrainingError: if a training is at fault, or workers failed too often.
        StoppedError: if the run is ending.
        IncompleteStageError: if a training left no result.
    """
    cache = context.cache
    with cache.claim([training.stage for training in planned]) as missing:
        keys = {stage.key for stage in missing}
        trainings = [training for training in planned if training.stage.key in keys]
        if not trainings:
            return
        # In Ray Train a name is a lineage, so that it changes with the trainings.
        name = f"{kind}-{digest(sorted(keys))}"
        storage = cache.root / f".train-{name}"
        storage.mkdir(exist_ok=True)
        try:
            with context.display.watch(trainings[0].label, storage / trainer.PROGRESS):
                context.start_ray()
                trainer.train(
                    kind,
                    [training.task for training in trainings],
                    name=name,
                    storage=storage,
                    resources=context.config.resources,
                )
        finally:
            # Finished trainings become stages even if another one failed.
            for training in trainings:
                partial = training.stage.partial
                if trainer.is_finished(kind, partial):
                    described = json.loads((partial / trainer.FINISHED[kind]).read_text())
                    cache.finish(training.stage, described["seconds"])
            shutil.rmtree(storage, ignore_errors=True)
        lost = [training for training in trainings if not training.stage.is_done]
        if lost:
            raise IncompleteStageError(
                f"{len(lost)} of {len(trainings)} trainings ended without a result in "
                f"{lost[0].stage.partial}, first: {lost[0].label}. Workers on several machines "
                "must write to one disk: set `cache` to a folder that all of them share"
            )
