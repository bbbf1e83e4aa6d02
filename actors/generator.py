"""Generation workers: each answers one shard of problems at a time and writes one trace file.

A shard is the unit of work and of recovery. Its rows, seeds and batch never change. So a shard that
is made twice, because a worker died or a run was killed, is the same file, and rows are neither
lost nor doubled.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from actors.threads import use_one_thread_on_cpu
from azeotrope import models
from azeotrope.collect import Origin, collect
from azeotrope.config import Config
from azeotrope.defenses import base as defenses
from azeotrope.generation import Sampling
from azeotrope.tasks import TaskConfig
from azeotrope.tasks import build as build_task
from azeotrope.traces import write_traces


class GenerationJob(Config):
    """One shard: which problems, which model, how to draw, where to write."""

    model: str
    label: str = "teacher"
    task: TaskConfig
    split: str
    start: int
    count: int
    sampling: Sampling
    sample: int = 0
    seed: int = 0
    defense: str = "none"
    decoding: tuple[dict[str, Any], ...] = Field(default=(), description="decoding-stage defenses")
    output: str


class GenerationWorker:
    """A Ray Data actor around the transformers engine; models stay loaded between shards."""

    def __init__(self) -> None:
        use_one_thread_on_cpu()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [run(GenerationJob.model_validate(json.loads(job))) for job in batch["job"]]
        return {"rows": np.array(rows)}


def run(job: GenerationJob) -> int:
    """Make one shard; returns its number of rows."""
    task = build_task(job.task)
    problems = task.problems(job.split, job.count, skip=job.start)
    traces = collect(
        _model(job.model),
        task,
        problems,
        job.sampling,
        origin=Origin(job.seed, job.sample, job.label, job.defense),
        hooks=[defenses.resolve(dict(settings)) for settings in job.decoding],
    )
    write_traces(Path(job.output), traces)
    return len(traces)


@lru_cache(maxsize=2)
def _model(name: str) -> models.Loaded:
    return models.load(name)
