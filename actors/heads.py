"""What a Ray Train worker does to train a defended head from stored features."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from actors import engine_check
from azeotrope import models
from azeotrope.collect import SHARD, collect, finish
from azeotrope.config import Config
from azeotrope.defenses import base as defenses
from azeotrope.defenses.base import Defense
from azeotrope.files import write_json
from azeotrope.generation import Sampling
from azeotrope.heads.export import export, head_from, proxy_head_from, put_head
from azeotrope.heads.features import FeaturePair, pair_up, read_features
from azeotrope.heads.folding import check_foldable
from azeotrope.heads.head import Head
from azeotrope.heads.rounds import HeadResult, Round
from azeotrope.heads.search import HeadSearch, HeadTraining, UtilityCheck
from azeotrope.heads.surrogate import surrogate_from
from azeotrope.heads.utility import Utility
from azeotrope.logits.vocabulary import token_rows
from azeotrope.tasks import TaskConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import encode_prompt
from azeotrope.traces import ground_truth

CHECKED_PROMPTS = 16
"""Prompts on which the exported checkpoint is compared with the model in memory."""


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
        description="whether the head that training begins with is known to keep the floor. If it "
        "is not, and no round keeps the floor, the undefended head is exported",
    )


@dataclass(frozen=True)
class HeadWork:
    """The models and modules of one job."""

    job: HeadJob
    defense: Defense
    loaded: models.Loaded
    """The teacher of this pass; its trunk stays as it is and its head is replaced."""
    clean: models.Loaded
    """The undefended teacher: the same object as `loaded` in the first pass."""
    clean_head: Head
    head: Head
    """What is trained."""
    proxies: tuple[torch.nn.Module, ...]


def run(
    data: dict[str, Any],
    folder: Path,
    state: Path,
    *,
    rank: int,
    progress: Callable[[int, int], None],
) -> None:
    """Train, export to `folder/teacher`, and describe the result in `folder/head.json`.

    Args:
        data: a `HeadJob` as plain data.
        state: the folder from which a killed job goes on.
        rank: of this worker; only the first one exports.
        progress: called with the steps taken and the steps in all.

    Raises:
        ValueError: if the model cannot carry a changed head, there is nothing to train on, or the
            defense refuses its settings.
        NonFiniteLossError: if the objective stops being finite.
        ExportError: if the exported checkpoint is not the trained model.
    """
    started = time.perf_counter()
    work = load(HeadJob.model_validate(data))
    result, clean_utility = train(work, state, progress)
    if rank != 0:
        return
    undefended = is_undefended(work.job, result)
    about_export = export_head(
        work, work.clean_head if undefended else work.head.folded(), folder / "teacher"
    )
    described = {
        **describe(result, clean_utility, undefended=undefended),
        "export": about_export,
        "fingerprint": models.fingerprint(str(folder / "teacher")),
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_json(folder / "head.json", described)


def load(job: HeadJob) -> HeadWork:
    """Load the teacher and what it is compared with, and make the head that is trained.

    Raises:
        ValueError: if the model cannot carry a changed head, or the defense refuses its settings.
    """
    defense = defenses.resolve(job.defense)
    loaded = models.load(job.teacher)
    check_foldable(loaded.model)
    clean = loaded if job.clean == job.teacher else models.load(job.clean)
    clean_head = head_from(clean).to(loaded.device)
    head = defense.parametrise(head_from(loaded), clean_head, token_rows(loaded.tokenizer))
    proxies = tuple(_proxy(name, loaded, defense.layer) for name in job.proxies)
    return HeadWork(job, defense, loaded, clean, clean_head, head.to(loaded.device), proxies)


def train(
    work: HeadWork, state: Path, progress: Callable[[int, int], None]
) -> tuple[HeadResult, Utility | None]:
    """Train the head in place.

    Returns:
        What the search did, and the undefended teacher's utility if there is a floor.

    Raises:
        ValueError: if there is nothing to train on.
        NonFiniteLossError: if the objective stops being finite.
    """
    job = work.job
    # Measured before the first round: from then on `loaded`, which may be the same model, carries
    # the head that is being trained.
    clean_utility = _measure(work.clean, job) if job.training.floor else None

    def measure(candidate: Head) -> Utility:
        put_head(work.loaded, candidate.folded())
        return _measure(work.loaded, job)

    steps = job.training.fit.steps
    total = steps * (job.training.floor.rounds if job.training.floor else 1)
    finished_rounds = 0

    def on_round(finished: Round) -> None:
        nonlocal finished_rounds
        finished_rounds = finished.number + 1

    progress(0, total)
    search = HeadSearch(
        work.head,
        work.proxies,
        _features(job.features, len(job.proxies)),
        work.defense,
        job.training,
        folder=state,
        on_round=on_round,
        on_step=lambda entry: progress(finished_rounds * steps + entry.step, total),
    )
    check = UtilityCheck(measure, clean_utility) if clean_utility is not None else None
    return search.run(check), clean_utility


def is_undefended(job: HeadJob, result: HeadResult) -> bool:
    """Whether the undefended head must be exported.

    It must if no round kept the floor and the head that training began with may not keep it
    either: an exported head is always one that is known to be useful.
    """
    no_round_held = bool(result.rounds) and not any(item.accepted for item in result.rounds)
    return no_round_held and not job.keeps_floor


def export_head(work: HeadWork, head: Head, folder: Path) -> dict[str, Any]:
    """Write the checkpoint with this head and compare it in transformers and in vLLM.

    Raises:
        ExportError: if the files on disk are not the model in memory.
    """
    task = build_task(work.job.task)
    prompts = [
        list(encode_prompt(work.loaded.tokenizer, task.messages(problem.question)))
        for problem in task.problems("validation", CHECKED_PROMPTS)
    ]
    check = export(work.loaded, head, folder, prompts)
    return {
        **asdict(check),
        "vllm_difference": engine_check.compare(work.loaded, folder, prompts),
        "float32": work.loaded.model.dtype == torch.float32,
    }


def describe(
    result: HeadResult, clean_utility: Utility | None, *, undefended: bool
) -> dict[str, Any]:
    """What `head.json` says about the training."""
    return {
        "strength": result.strength,
        "undefended": undefended,
        "clean": asdict(clean_utility) if clean_utility else None,
        "rounds": [asdict(item) for item in result.rounds],
        "log": [[entry.step, entry.loss] for entry in result.log],
        "parts": [entry.parts for entry in result.log],
    }


def _proxy(name: str, teacher: models.Loaded, layer: str | None) -> torch.nn.Module:
    """A proxy's head, or its last layers as a surrogate if the defense needs gradients."""
    loaded = models.load(name, device=teacher.device)
    if layer is None:
        return proxy_head_from(loaded, teacher, name).to(teacher.device)
    return surrogate_from(loaded, teacher, layer, name)


def _features(folders: Sequence[str], proxies: int) -> list[FeaturePair]:
    pairs: list[FeaturePair] = []
    for folder in map(Path, folders):
        teacher_features = read_features(folder / "teacher")
        proxy_features = [read_features(folder / f"proxy-{number}") for number in range(proxies)]
        pairs += pair_up(teacher_features, proxy_features)
    if not pairs:
        raise ValueError(
            "no trace is left to train the head on: the teacher answered none of them correctly; "
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
            "correct, so there is nothing to begin with; take more problems, or set "
            "floor.begun=null"
        )
    greedy = Sampling(temperature=0.0, max_new_tokens=job.max_new_tokens)
    finished = finish(loaded, task, truth, greedy, shard=job.shard)
    return Utility(*rates, begun=sum(finished) / len(finished))
