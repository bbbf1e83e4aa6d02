"""The preparing actor: measures proxies, and takes the gradient that a decoding defense follows."""

import json
from pathlib import Path

import numpy as np
from pydantic import Field

from actors.teacher import FeatureJob, read_examples
from actors.threads import use_one_thread_on_cpu
from azeotrope import models
from azeotrope.config import Config
from azeotrope.proxies.prepared import ProxyPreparation, prepare
from azeotrope.tasks import TaskConfig
from azeotrope.tokens import Boundary


class PreparationJob(Config):
    """One proxy, and the clean traces of its teacher that it is measured on."""

    proxy: str
    teacher: str
    traces: tuple[str, ...] = Field(description="files of traces, all of which are used")
    folder: str
    settings: ProxyPreparation
    with_direction: bool
    boundary: Boundary
    max_length: int
    task: TaskConfig


class PreparationActor:
    """Prepares proxies. A proxy that is prepared twice gives the same files."""

    def __init__(self) -> None:
        use_one_thread_on_cpu()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for text in batch["job"]:
            _prepare(PreparationJob.model_validate(json.loads(text)))
        return batch


def _prepare(job: PreparationJob) -> None:
    teacher = models.load(job.teacher)
    examples = []
    for file in job.traces:
        features = FeatureJob(
            traces=file,
            folder=job.folder,
            boundary=job.boundary,
            max_length=job.max_length,
            task=job.task,
        )
        examples += read_examples(features, teacher)[0]
    prepare(
        job.proxy,
        teacher,
        examples,
        Path(job.folder),
        job.settings,
        with_direction=job.with_direction,
    )
