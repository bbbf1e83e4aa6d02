"""What a Ray Train worker does to train a defended head from stored features."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from actors import engine_check
from azeotrope import models
from azeotrope.collect import SHARD, collect, finish
from azeotrope.config import Config
from azeotrope.defenses import base as defenses
from azeotrope.files import write_json
from azeotrope.generation import Sampling
from azeotrope.heads.export import export, head_from, proxy_head_from, put_head
from azeotrope.heads.features import FeaturePair, pair_up, read_features
from azeotrope.heads.folding import check_foldable
from azeotrope.heads.head import Head
from azeotrope.heads.search import HeadTraining, Round, Utility, train_head
from azeotrope.heads.surrogate import surrogate_from
from azeotrope.logits.vocabulary import token_rows
from azeotrope.tasks import TaskConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import encode_prompt
from azeotrope.traces import ground_truth

CHECKED_PROMPTS = 16


class HeadJob(Config):
    """Everything that decides a defended head."""

    teacher: str = Field(description="the checkpoint whose head is trained further")
    clean: str = Field(description="the undefended teacher, which sets the utility floor")
    proxies: tuple[str, ...]
    defense: dict[str, Any]
    training: HeadTraining
    features: tuple[str, ...] = Field(description="folders of the teacher's and proxies' features")
    task: TaskConfig
    max_new_tokens: int
    shard: int = Field(default=SHARD, ge=1, description="problems answered side by side")
    keeps_floor: bool = Field(
        default=True,
        description="the head that training begins with is known to keep the floor. If it does "
        "not, and no round does, the undefended head is exported",
    )


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
    check_foldable(loaded.model)
    # In the first pass the undefended teacher is the one that is loaded.
    undefended = loaded if job.clean == job.teacher else models.load(job.clean)
    plain = head_from(undefended).to(loaded.device)
    head = defense.parametrise(head_from(loaded), plain, token_rows(loaded.tokenizer))
    head = head.to(loaded.device)
    proxies = tuple(_proxy(name, loaded, defense.layer) for name in job.proxies)
    total = job.training.floor.rounds if job.training.floor else 1
    clean = _measure(undefended, job) if job.training.floor else None

    def measure(candidate: Head) -> Utility:
        put_head(loaded, candidate.folded())
        return _measure(loaded, job)

    steps = job.training.fit.steps
    progress(0, total * steps)
    done = [0]

    def on_round(this: Round) -> None:
        done[0] = this.number + 1

    result = train_head(
        head,
        proxies,
        _features(job.features, len(job.proxies)),
        defense,
        job.training,
        measure=measure,
        clean=clean,
        folder=state,
        on_round=on_round,
        on_step=lambda entry: progress(done[0] * steps + entry.step, total * steps),
    )
    if rank != 0:
        return
    task = build_task(job.task)
    prompts = [
        list(encode_prompt(loaded.tokenizer, task.messages(problem.question)))
        for problem in task.problems("validation", CHECKED_PROMPTS)
    ]
    none_held = bool(result.rounds) and not any(item.accepted for item in result.rounds)
    undefended_again = none_held and not job.keeps_floor
    chosen = plain if undefended_again else head.folded()
    check = export(loaded, chosen, folder / "teacher", prompts)
    in_vllm = engine_check.compare(loaded, folder / "teacher", prompts)
    described = {
        "strength": result.strength,
        "undefended": undefended_again,
        "clean": asdict(clean) if clean else None,
        "rounds": [asdict(item) for item in result.rounds],
        "log": [[entry.step, entry.loss] for entry in result.log],
        "parts": [entry.parts for entry in result.log],
        "export": {
            **asdict(check),
            "vllm_difference": in_vllm,
            "float32": loaded.model.dtype == torch.float32,
        },
        "fingerprint": models.fingerprint(str(folder / "teacher")),
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_json(folder / "head.json", described)


def _proxy(name: str, teacher: models.Loaded, layer: str | None) -> torch.nn.Module:
    """What a defense compares with: a proxy's head, or its last layers where it needs gradients."""
    loaded = models.load(name, device=teacher.device)
    if layer is None:
        return proxy_head_from(loaded, teacher, name).to(teacher.device)
    return surrogate_from(loaded, teacher, layer, name)


def _features(folders: Sequence[str], proxies: int) -> list[FeaturePair]:
    pairs: list[FeaturePair] = []
    for folder in map(Path, folders):
        found = read_features(folder / "teacher")
        pairs += pair_up(found, [read_features(folder / f"proxy-{i}") for i in range(proxies)])
    if not pairs:
        raise ValueError(
            "no trace is left to train the head on: the teacher answered none of them right; "
            "set training.only_correct=false, or take more traces"
        )
    return pairs


def _measure(loaded: models.Loaded, job: HeadJob) -> Utility:
    """Accuracy of generated answers on the first validation problems, greedy and sampled."""
    floor = job.training.floor
    assert floor is not None
    task = build_task(job.task)
    problems = task.problems("validation", floor.problems)
    rates: list[float] = []
    for temperature in (0.0, floor.temperature):
        sampling = Sampling(temperature=temperature, max_new_tokens=job.max_new_tokens)
        traces = collect(loaded, task, problems, sampling, shard=job.shard)
        rates.append(sum(trace.correct for trace in traces) / len(problems))
    if floor.begun is None:
        return Utility(*rates)
    truth = [trace for trace in ground_truth(task, problems) if trace.correct]
    if not truth:
        raise ValueError(
            f"floor.begun: none of the ground truth of {len(problems)} validation problems is "
            "right, so there is nothing to begin with; take more problems, or set floor.begun=null"
        )
    greedy = Sampling(temperature=0.0, max_new_tokens=job.max_new_tokens)
    finished = finish(loaded, task, truth, greedy, shard=job.shard)
    return Utility(*rates, begun=sum(finished) / len(finished))
