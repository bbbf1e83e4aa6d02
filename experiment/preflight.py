"""Checks that cost seconds and spare hours: everything a run needs, before any model loads."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.heads import CHECKED_PROMPTS
from azeotrope import models, packaged
from azeotrope.config import ConfigError
from azeotrope.heads.folding import check_foldable
from azeotrope.heads.surrogate import check_vocabulary, first_block
from azeotrope.heads.utility import UtilityFloor
from azeotrope.logits.vocabulary import share, token_rows
from azeotrope.pocket import smollm2
from azeotrope.tasks import Task
from azeotrope.tasks import build as build_task
from azeotrope.traces import ground_truth
from experiment.settings import LESSON_PROBLEMS, DefenseChoice, ExperimentConfig

LEAST_DISK = 500 << 20


def preflight(config: ExperimentConfig, *, convert: bool = True) -> None:
    """Raise the first thing that would stop the run later; nothing is downloaded.

    What is on a hub is checked as far as it is on this machine: models and data sets that must be
    downloaded are fetched when the run starts.

    Args:
        convert: make the checkpoints that are converted from an installed package. If not, it is
            only checked that the package is there.

    Raises:
        ConfigError: with what was given, what is allowed and what to do.
    """
    _disk(Path(config.cache))
    suspects = [name for name in config.probe.subspace if name != "teacher"] if config.probe else []
    for name in (*config.models, *suspects):
        _smollm2(name, convert)
    for name in suspects:
        is_here(name)
    here = {name for name in config.models if is_here(name)}
    for name in here:
        _context(name, config.max_length)
    if here.issuperset((config.teacher, *config.proxies)):
        _proxies(config)
        _defenses(config)
    if config.teacher in here:
        _views(config)
    if config.task.is_local:
        _problems(config)


def is_here(name: str) -> bool:
    """Whether a model is a checkpoint on this machine, and not to be converted or downloaded.

    Raises:
        ConfigError: if it should be here and is not.
    """
    if packaged.is_packaged(name) and not packaged.is_converted(name):
        return False
    try:
        return Path(models.resolve(name)).is_dir()
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None


def _smollm2(name: str, convert: bool) -> None:
    """Have the checkpoint of this name, if it is one that comes out of a package."""
    if not packaged.is_packaged(name):
        return
    try:
        layers, folder = packaged.layers_of(name), packaged.folder_of(name)
        if packaged.is_converted(name):
            return
        smollm2.weights()
        if convert:
            print(f"converting {name} to {folder}, once; this takes half a minute", flush=True)
            smollm2.ensure(folder, layers)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; in a checkout, `make smollm` does it") from None
    except (FileExistsError, ValueError) as error:
        raise ConfigError(str(error)) from None


def _problems(config: ExperimentConfig) -> None:
    """Ask the task for every problem that the run will: it says what is missing or broken."""
    parts = [part for choice in config.defenses for part in choice.resolve()]
    floors = [choice.training.floor for choice in config.defenses]
    trained = any(part.stage == "weights" and not part.is_identity for part in parts)
    held_out = [floor.problems for floor in floors if floor and trained]
    exams = max(config.teacher_problems, config.exam_problems if config.students else 0)
    checked = [CHECKED_PROMPTS, *held_out] if trained else []
    lessons = [LESSON_PROBLEMS for choice in config.defenses if choice.lesson is not None]
    informed, begun = (config.probe.information, config.probe.begun) if config.probe else (0, 0)
    wanted = {
        "train": max([config.most_traces, *(_own_problems(config, c) for c in config.defenses)]),
        "test": 0,
        "validation": max([*checked, *lessons, informed]),
    }
    wanted[config.exam_split] = max(wanted[config.exam_split], exams, begun)
    try:
        task = build_task(config.task)
        for split, count in wanted.items():
            if count:
                task.problems(split, count)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"task: {error}") from None
    _begun(config, task, [floor for floor in floors if floor and trained])


def _begun(config: ExperimentConfig, task: Task, floors: list[UtilityFloor]) -> None:
    """Answers can be begun only where the ground truth is right."""
    asked = [("floor.begun", "validation", floor.problems) for floor in floors if floor.begun]
    if config.probe is not None and config.probe.begun:
        asked.append(("probe.begun", config.exam_split, config.probe.begun))
    for setting, split, count in asked:
        texts = ground_truth(task, task.problems(split, count))
        if not any(text.correct for text in texts):
            raise ConfigError(
                f"{setting}: none of the ground truth of {count} {split} problems is right, so "
                "there is nothing to begin with; take more problems, or do without it"
            )


def _own_problems(config: ExperimentConfig, choice: DefenseChoice) -> int:
    """Training problems up to the last one that this defense asks for."""
    if not any(part.stage == "weights" and not part.is_identity for part in choice.resolve()):
        return 0
    training = choice.training
    most = max(
        config.head_traces or config.traces,
        (training.refresh_traces or 0) if training.refreshes else 0,
        training.truth,
    )
    lesson = config.most_traces + choice.lesson.traces if choice.lesson else 0
    return max(most + (config.most_traces if training.apart else 0), lesson)


def _defenses(config: ExperimentConfig) -> None:
    """Settings of defenses that only the models can refuse: ranks, layers, vocabularies."""
    cases = [(c, p) for c in config.defenses for p in c.resolve() if p.stage == "weights"]
    hidden = AutoConfig.from_pretrained(models.resolve(config.teacher)).get_text_config()
    teacher = models.load_tokenizer(config.teacher)
    cases = [(choice, part) for choice, part in cases if not part.is_identity]
    if cases:
        try:
            check_foldable(_skeleton(config.teacher))
        except ValueError as error:
            raise ConfigError(f"teacher: {error}") from None
    for choice, part in cases:
        try:
            part.check(hidden.hidden_size)
            if part.needs_truth and not choice.training.truth:
                raise ValueError(
                    "it looks at ground-truth texts, but training.truth is 0; say how many, or "
                    "set utility_on and cosine_on to own"
                )
            for name in config.proxies if part.layer is not None else ():
                assert part.layer is not None
                check_vocabulary(models.load_tokenizer(name), teacher, name)
                first_block(_skeleton(name), part.layer)
        except ValueError as error:
            raise ConfigError(f"defense {part.config.name}: {error}") from None


def _skeleton(name: str) -> PreTrainedModel:
    """The model's shapes without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models.resolve(name)))


def _views(config: ExperimentConfig) -> None:
    tokens = token_rows(models.load_tokenizer(config.teacher))
    lessons = [choice.lesson.attacks for choice in config.defenses if choice.lesson is not None]
    for item in (config.attack, *config.attacks, *(item for items in lessons for item in items)):
        top_k = (item.get("view") or {}).get("top_k")
        if top_k is not None and top_k > tokens:
            raise ConfigError(
                f"attack {item['name']}: view.top_k {top_k} is larger than the teacher's "
                f"vocabulary of {tokens} tokens; lower it, or leave it out to see them all"
            )
        if top_k is not None and item.get("pairs"):
            raise ConfigError(
                f"attack {item['name']}: an inversion needs full logits; leave out view.top_k or "
                "pairs"
            )


def _disk(cache: Path) -> None:
    place = cache
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < LEAST_DISK:
        raise ConfigError(
            f"{place} has {free >> 20} MB free and a run needs at least {LEAST_DISK >> 20} MB; "
            "free some, or set `cache` and `runs` to another disk"
        )


def _context(name: str, max_length: int) -> None:
    holds = models.context_length(name)
    if max_length > holds:
        raise ConfigError(
            f"max_length {max_length} is longer than the context of {name}, {holds} tokens; "
            "lower max_length"
        )


def _proxies(config: ExperimentConfig) -> None:
    """Compare vocabularies where the tokenizers are on this machine: nothing is downloaded."""
    names = (config.teacher, *config.proxies)
    if not all(Path(models.resolve(name)).is_dir() for name in names):
        return
    teacher = models.load_tokenizer(config.teacher)
    for name in config.proxies:
        try:
            share(teacher, models.load_tokenizer(name), proxy_name=name)
        except ValueError as error:
            raise ConfigError(f"proxies: {error}") from None
