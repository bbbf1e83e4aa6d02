"""Tasks by name: a task called `gsm8k` is the module `azeotrope.tasks.gsm8k`."""

import importlib
from typing import Annotated

from pydantic import Field

from azeotrope.tasks.base import Problem, Task
from azeotrope.tasks.gsm8k import Gsm8kConfig
from azeotrope.tasks.jsonl import JsonlConfig
from azeotrope.tasks.pocket import PocketConfig

TaskConfig = Annotated[PocketConfig | Gsm8kConfig | JsonlConfig, Field(discriminator="name")]


def build(config: PocketConfig | Gsm8kConfig | JsonlConfig) -> Task:
    """The task a configuration describes, its files read and checked.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file holds broken rows.
    """
    return importlib.import_module(f"{__name__}.{config.name}").build(config)


def is_local(config: PocketConfig | Gsm8kConfig | JsonlConfig) -> bool:
    """Whether `build` finds all rows on this machine, without a download."""
    return not isinstance(config, Gsm8kConfig) or config.folder is not None


__all__ = [
    "Gsm8kConfig",
    "JsonlConfig",
    "PocketConfig",
    "Problem",
    "Task",
    "TaskConfig",
    "build",
    "is_local",
]
