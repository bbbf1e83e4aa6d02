"""What a Ray Train worker does to train a defended head from stored features."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from actors.generator import SHARD
from azeotrope import models
from azeotrope.collect import collect
from azeotrope.config import Config, write_json
from azeotrope.defenses import base as defenses
from azeotrope.defenses.base import Head
from azeotrope.export import export, head_from, proxy_head_from, put_head
from azeotrope.features import FeaturePair, pair_up, read_features
from azeotrope.generation import Sampling
from azeotrope.head_training import HeadTraining, Utility, train_head
from azeotrope.tasks import TaskConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import encode_prompt

CHECKED_PROMPTS = 16


class HeadJob(Config):
    """Everything that decides a defended head."""

    teacher: str = Field(description="the checkpoint whose head is trained further")
    clean: str = Field(description="the undefended teacher, which sets the utility floor")
    proxies: tuple[str, ...]
    defense: dict[str, Any]
    training: HeadTraining
    features: str
    task: TaskConfig
    max_new_tokens: int
    shard: int = Field(default=SHARD, ge=1, description="problems answered side by side")


def run(
    data: dict[str, Any],
    folder: Path,
    state: Path,
    *,
    rank: int,
    progress: Callable[[int, int], None],
) -> None:
    """Train, export to `folder/teacher`, and describe the result in `folder/head.json`."""
    started = time.perf_counter()
    job = HeadJob.model_validate(data)
    defense = defenses.resolve(job.defense)
    loaded = models.load(job.teacher)
    head = head_from(loaded).to(loaded.device)
    proxies = tuple(
        proxy_head_from(models.load(name, device=loaded.device), loaded, name).to(loaded.device)
        for name in job.proxies
    )
    total = job.training.floor.rounds if job.training.floor else 1
    clean = None
    if job.training.floor:
        # In the first pass the undefended teacher is the one that is loaded.
        clean = _measure(loaded if job.clean == job.teacher else models.load(job.clean), job)

    def measure(candidate: Head) -> Utility:
        put_head(loaded, candidate)
        return _measure(loaded, job)

    progress(0, total)
    result = train_head(
        head,
        proxies,
        _features(Path(job.features), len(job.proxies)),
        defense,
        job.training,
        measure=measure,
        clean=clean,
        folder=state,
        on_round=lambda this: progress(this.number + 1, total),
    )
    if rank != 0:
        return
    task = build_task(job.task)
    prompts = [
        list(encode_prompt(loaded.tokenizer, task.messages(problem.question)))
        for problem in task.problems("validation", CHECKED_PROMPTS)
    ]
    check = export(loaded, head, folder / "teacher", prompts)
    described = {
        "strength": result.strength,
        "clean": asdict(clean) if clean else None,
        "rounds": [asdict(item) for item in result.rounds],
        "log": [[entry.step, entry.loss] for entry in result.log],
        "export": asdict(check),
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_json(folder / "head.json", described)


def _features(folder: Path, proxies: int) -> list[FeaturePair]:
    teacher = read_features(folder / "teacher")
    if not teacher:
        raise ValueError(
            "no trace is left to train the head on: the teacher answered none of them right; "
            "set training.only_correct=false, or take more traces"
        )
    return pair_up(teacher, [read_features(folder / f"proxy-{i}") for i in range(proxies)])


def _measure(loaded: models.Loaded, job: HeadJob) -> Utility:
    """Accuracy of generated answers on the first validation problems, greedy and sampled."""
    floor = job.training.floor
    assert floor is not None
    task = build_task(job.task)
    problems = task.problems("validation", floor.problems)
    rates: list[float] = []
    for temperature in (0.0, floor.temperature):
        sampling = Sampling(temperature=temperature, max_new_tokens=job.max_new_tokens)
        right = 0
        for start in range(0, len(problems), job.shard):
            traces = collect(loaded, task, problems[start : start + job.shard], sampling)
            right += sum(trace.correct for trace in traces)
        rates.append(right / len(problems))
    return Utility(*rates)
