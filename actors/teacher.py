"""The teacher actor: runs the frozen trunk over trace files and stores its hidden states."""

import json
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from azeotrope import models
from azeotrope.config import Config
from azeotrope.features import compute, write_features
from azeotrope.tokens import Boundary, Example, from_ids
from azeotrope.traces import read_traces


class FeatureJob(Config):
    """One trace file and the folder under which each model writes its features of it."""

    traces: str
    folder: str
    boundary: Boundary = Field(default_factory=Boundary)
    max_length: int = Field(default=256, ge=8)
    only_correct: bool = False


class TeacherActor:
    """Idempotent: a file made again has the same content and replaces itself whole."""

    def __init__(self, model: str) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        self.loaded = models.load(model)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for text in batch["job"]:
            job = FeatureJob.model_validate(json.loads(text))
            output = Path(job.folder) / "teacher" / Path(job.traces).name
            if not output.is_file():
                examples = read_examples(job, self.loaded)
                write_features(output, compute(self.loaded.model, examples))
        return batch


def read_examples(job: FeatureJob, teacher: models.Loaded) -> list[Example]:
    """The teacher's own tokens of a trace file, with their reasoning and answer masks.

    Raises:
        ValueError: if a trace was written by no model, so there are no tokens of the teacher's.
    """
    traces = read_traces(Path(job.traces))
    unwritten = [trace.id for trace in traces if not trace.completion_ids]
    if unwritten:
        raise ValueError(
            f"{len(unwritten)} traces in {job.traces} hold text but no token ids, first "
            f"{unwritten[0]}; head defenses train on traces the teacher wrote itself"
        )
    return [
        from_ids(
            teacher.tokenizer,
            trace.prompt_ids,
            trace.completion_ids,
            boundary=job.boundary,
            max_length=job.max_length,
            id=trace.id,
        )
        for trace in traces
        if trace.correct or not job.only_correct
    ]
