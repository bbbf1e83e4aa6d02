"""The teacher actor: runs the frozen trunk over trace files and stores its hidden states."""

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
from azeotrope.tokens import Boundary, Example, encode, from_ids
from azeotrope.traces import Trace, read_traces


class FeatureJob(Config):
    """One trace file and the folder under which each model writes its features of it."""

    traces: str
    folder: str
    boundary: Boundary = Field(default_factory=Boundary)
    max_length: int = Field(default=256, ge=8)
    only_correct: bool = False
    task: TaskConfig = Field(description="words the prompt of a text that no model wrote")
    layer: str | None = Field(
        default=None, description="proxies store what enters this layer, not their last states"
    )


class TeacherActor:
    """Idempotent: a file made again has the same content and replaces itself whole."""

    def __init__(self, model: str) -> None:
        use_one_thread_on_cpu()
        self.loaded = models.load(model)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for text in batch["job"]:
            job = FeatureJob.model_validate(json.loads(text))
            output = Path(job.folder) / "teacher" / Path(job.traces).name
            if not output.is_file():
                found, own = read_examples(job, self.loaded)
                write_features(output, compute(self.loaded.model, found, own=own))
        return batch


def read_examples(job: FeatureJob, teacher: models.Loaded) -> tuple[list[Example], bool]:
    """The tokens of a trace file with their masks, and whether the teacher wrote them.

    Text that no model wrote, such as reference solutions, goes through the teacher's tokenizer.

    Raises:
        ValueError: if only some traces have token ids.
    """
    traces = [t for t in read_traces(Path(job.traces)) if t.correct or not job.only_correct]
    unwritten = [trace.id for trace in traces if not trace.completion_ids]
    if unwritten and len(unwritten) < len(traces):
        raise ValueError(
            f"{len(unwritten)} of {len(traces)} traces in {job.traces} hold text but no token ids, "
            f"first {unwritten[0]}; a file holds what the teacher wrote, or texts, and not both"
        )
    if unwritten:
        return _encoded(job, teacher, traces), False
    found = [
        from_ids(
            teacher.tokenizer,
            trace.prompt_ids,
            trace.completion_ids,
            boundary=job.boundary,
            max_length=job.max_length,
            id=trace.id,
        )
        for trace in traces
    ]
    return found, True


def _encoded(job: FeatureJob, teacher: models.Loaded, traces: list[Trace]) -> list[Example]:
    task = build_task(job.task)
    return [
        encode(
            teacher.tokenizer,
            task.messages(trace.question),
            trace.text,
            boundary=job.boundary,
            max_length=job.max_length,
            finished=trace.finished,
            id=trace.id,
        )
        for trace in traces
    ]
