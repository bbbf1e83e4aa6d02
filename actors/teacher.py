"""The teacher actor: runs the frozen layers below the head on traces, and stores their output."""

import json
from pathlib import Path

import numpy as np
from pydantic import Field

from actors.threads import use_one_thread_on_cpu
from azeotrope import models
from azeotrope.config import Config
from azeotrope.heads.features import compute, write_features
from azeotrope.tasks import TaskConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import Boundary, Example, from_ids
from azeotrope.traces import example_of, read_traces


class FeatureJob(Config):
    """One trace file, and the folder where each model writes its features of that file."""

    traces: str
    folder: str
    boundary: Boundary = Field(default_factory=Boundary)
    max_length: int = Field(default=256, ge=8)
    only_correct: bool = False
    task: TaskConfig = Field(description="makes the prompt of a text that no model wrote")
    layer: str | None = Field(
        default=None, description="proxies store the input of this layer, not their last states"
    )


class TeacherActor:
    """Computes features. A file that is made twice has the same content."""

    def __init__(self, model: str) -> None:
        use_one_thread_on_cpu()
        self.loaded = models.load(model)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for text in batch["job"]:
            job = FeatureJob.model_validate(json.loads(text))
            output = Path(job.folder) / "teacher" / Path(job.traces).name
            if not output.is_file():
                examples, own = read_examples(job, self.loaded)
                write_features(output, compute(self.loaded.model, examples, own=own))
        return batch


def read_examples(job: FeatureJob, teacher: models.Loaded) -> tuple[list[Example], bool]:
    """The tokens of a trace file with their masks, and whether the teacher wrote them.

    Text that no model wrote, such as reference solutions, is encoded by the teacher's tokenizer.

    Raises:
        ValueError: if only some traces have token ids.
    """
    traces = [t for t in read_traces(Path(job.traces)) if t.correct or not job.only_correct]
    unwritten = [trace.id for trace in traces if not trace.completion_ids]
    if unwritten and len(unwritten) < len(traces):
        raise ValueError(
            f"{len(unwritten)} of {len(traces)} traces in {job.traces} hold text but no token ids, "
            f"first {unwritten[0]}; a file holds either what the teacher wrote or other texts"
        )
    if unwritten:
        task = build_task(job.task)
        return [
            example_of(trace, teacher.tokenizer, task, job.boundary, job.max_length)
            for trace in traces
        ], False
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
    ], True
