"""Checks that cost seconds and spare hours: everything a run needs, before any model loads."""

import shutil
from pathlib import Path

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.tasks import build as build_task
from azeotrope.vocabulary import share
from workflows.settings import ExperimentConfig

LEAST_DISK = 500 << 20


def preflight(config: ExperimentConfig) -> None:
    """Raise the first thing that would stop the run later.

    Raises:
        ConfigError: with what was given, what is allowed and what to do.
    """
    _disk(Path(config.cache))
    for name in (config.teacher, *config.proxies, *(s.model for s in config.students)):
        try:
            place = Path(models.resolve(name))
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from None
        if place.is_dir():
            _context(name, config.max_length)
    _proxies(config)
    task = build_task(config.task)
    for split, count in (
        ("train", config.most_traces),
        ("test", max(config.exam_problems, config.teacher_problems)),
    ):
        found = len(task.problems(split, count))
        if found < count:
            raise ConfigError(
                f"{count} {split} problems are asked for but {config.task.name} has {found}; "
                "lower traces, budgets, exam_problems or teacher_problems"
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
