"""Checks before a run: they take seconds, load no model, and find what would fail after hours."""

import shutil
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from azeotrope import models, packaged
from azeotrope.attacks import base as attacks
from azeotrope.config import ConfigError
from azeotrope.defenses.base import Defense
from azeotrope.heads.folding import check_foldable
from azeotrope.heads.surrogate import check_tail, check_vocabulary, first_block
from azeotrope.logits.served import check_uncapped
from azeotrope.logits.vocabulary import share, token_rows
from azeotrope.pocket import smollm2
from azeotrope.tasks import build as build_task
from azeotrope.traces import ground_truth
from experiment.model_checks import check_model
from experiment.plan import all_attacks, begun_ranges, head_truth, problem_ranges
from experiment.settings import DefenseChoice, ExperimentConfig

LEAST_DISK = 500 << 20
"""Bytes of free disk space."""


def preflight(
    config: ExperimentConfig, console: Console | None = None, *, convert: bool = True
) -> None:
    """Check everything that would stop the run later; nothing is downloaded.

    Models and data sets of a hub are checked if they are on this machine. Those that must be
    downloaded are fetched when the run starts.

    Args:
        console: says which checkpoint is being converted; None writes to standard output.
        convert: convert the checkpoints that come from an installed package. If not, only the
            package is looked for.

    Raises:
        ConfigError: with what was given, what is allowed and what to do.
    """
    _disk(Path(config.cache))
    suspects = config.probe.suspects if config.probe else ()
    for name in (*config.models, *suspects):
        if packaged.is_packaged(name):
            _packaged_model(name, (console or Console()) if convert else None)
    for name in suspects:
        is_local_model(name)
    local_models = {name for name in config.models if is_local_model(name)}
    for name in sorted(local_models):
        _context(name, config.max_length)
        check_model(name, _skeleton(name))
    if local_models.issuperset((config.teacher, *config.proxies)):
        _proxies(config)
        _defenses(config)
    if config.teacher in local_models:
        _views(config)
    if config.task.is_local:
        _problems(config)


def is_local_model(name: str) -> bool:
    """Whether a model is a checkpoint on this machine, and not to be converted or downloaded.

    Raises:
        ConfigError: if the name is a folder or a shipped model that does not exist.
    """
    if packaged.is_packaged(name) and not packaged.is_converted(name):
        return False
    try:
        return Path(models.resolve(name)).is_dir()
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None


def _packaged_model(name: str, console: Console | None) -> None:
    """Check that a model's package is installed, and convert it unless `console` is None."""
    try:
        layers, folder = packaged.layers_of(name), packaged.folder_of(name)
        if packaged.is_converted(name):
            return
        smollm2.weights()
        if console is not None:
            console.print(
                f"converting {name} to {folder}, once; this takes half a minute", soft_wrap=True
            )
            smollm2.ensure(folder, layers)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; in a checkout, `make smollm` installs it") from None
    except (FileExistsError, ValueError) as error:
        raise ConfigError(str(error)) from None


def _problems(config: ExperimentConfig) -> None:
    """Ask the task for every problem that the run will ask for, and for usable ground truth."""
    needed = {"train": 0, "test": 0, "validation": 0}
    for problems in problem_ranges(config):
        needed[problems.split] = max(needed[problems.split], problems.end)
    try:
        task = build_task(config.task)
        for split, count in needed.items():
            if count:
                task.problems(split, count)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"task: {error}") from None
    for setting, problems in begun_ranges(config):
        texts = ground_truth(task, task.problems(problems.split, problems.count))
        if not any(text.correct for text in texts):
            raise ConfigError(
                f"{setting}: none of the ground truth of {problems.count} {problems.split} "
                "problems is right, so there is nothing to begin with; take more problems, or do "
                "without it"
            )


def _defenses(config: ExperimentConfig) -> None:
    """Check settings of defenses against the models: ranks, layers, vocabularies."""
    trained = [(choice, part) for choice in config.defenses for part in choice.acting("weights")]
    if not trained:
        return
    try:
        check_foldable(_skeleton(config.teacher))
    except ValueError as error:
        raise ConfigError(f"teacher: {error}") from None
    for choice, defense in trained:
        try:
            _defense(config, choice, defense)
        except ValueError as error:
            raise ConfigError(f"defense {defense.config.name}: {error}") from None


def _defense(config: ExperimentConfig, choice: DefenseChoice, defense: Defense) -> None:
    shape = AutoConfig.from_pretrained(models.resolve(config.teacher)).get_text_config()
    defense.check(shape.hidden_size)
    if defense.needs_truth and head_truth(config, choice) is None:
        raise ValueError(
            "it looks at ground-truth texts, but training.truth is 0; say how many, or set "
            "utility_on and cosine_on to own"
        )
    if defense.needs_proxies:
        for name in config.proxies:
            check_uncapped(_skeleton(name), "proxy")
    if defense.layer is None:
        return
    teacher = models.load_tokenizer(config.teacher)
    for name in config.proxies:
        check_vocabulary(models.load_tokenizer(name), teacher, name)
        skeleton = _skeleton(name)
        check_tail(skeleton)
        first_block(skeleton, defense.layer)


def _skeleton(name: str) -> PreTrainedModel:
    """The model's shapes without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models.resolve(name)))


def _views(config: ExperimentConfig) -> None:
    """Check what attacks see of a distribution against the teacher's vocabulary."""
    tokens = token_rows(models.load_tokenizer(config.teacher))
    for attack in all_attacks(config):
        if attacks.resolve(dict(attack)).needs != "text":
            _linear(config, attack["name"])
        top_k = (attack.get("view") or {}).get("top_k")
        if top_k is None:
            continue
        if top_k > tokens:
            raise ConfigError(
                f"attack {attack['name']}: view.top_k {top_k} is larger than the teacher's "
                f"vocabulary of {tokens} tokens; lower it, or leave it out to see them all"
            )
        if attack.get("pairs"):
            raise ConfigError(
                f"attack {attack['name']}: an inversion needs full logits; leave out view.top_k or "
                "pairs"
            )


def _linear(config: ExperimentConfig, attack: str) -> None:
    """An attack that queries distributions computes them from hidden states and the head."""
    try:
        check_uncapped(_skeleton(config.teacher), "teacher")
    except ValueError as error:
        raise ConfigError(f"attack {attack}: {error}") from None


def _disk(cache: Path) -> None:
    folder = cache
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK:
        raise ConfigError(
            f"{folder} has {free >> 20} MB free and a run needs at least {LEAST_DISK >> 20} MB; "
            "free some, or set `cache` and `runs` to another disk"
        )


def _context(name: str, max_length: int) -> None:
    context = models.context_length(name)
    if max_length > context:
        raise ConfigError(
            f"max_length {max_length} is longer than the context of {name}, {context} tokens; "
            "lower max_length"
        )


def _proxies(config: ExperimentConfig) -> None:
    """Check that every proxy shares enough of the teacher's vocabulary."""
    teacher = models.load_tokenizer(config.teacher)
    for name in config.proxies:
        try:
            share(teacher, models.load_tokenizer(name), proxy_name=name)
        except ValueError as error:
            raise ConfigError(f"proxies: {error}") from None
