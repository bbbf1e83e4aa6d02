"""Tasks by name: a task called `gsm8k` is the module `azeotrope.tasks.gsm8k`.

A task's module has a `Config` (its `name` is a literal) and a function `build(config)`. The modules
of this package that have both are the tasks; a new one needs no entry anywhere.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from azeotrope.tasks.base import Problem, Task, TaskSettings
from azeotrope.tasks.gsm8k import Config as Gsm8kConfig
from azeotrope.tasks.jsonl import Config as JsonlConfig
from azeotrope.tasks.pocket import Config as PocketConfig


def _configs() -> tuple[type[TaskSettings], ...]:
    modules = (
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    )
    kinds = [vars(module).get("Config") for module in modules]
    return tuple(
        kind for kind in kinds if isinstance(kind, type) and issubclass(kind, TaskSettings)
    )


if TYPE_CHECKING:
    TaskConfig = PocketConfig | Gsm8kConfig | JsonlConfig
else:
    # A union, not a look-up in a validator: a misspelt key gets the same message as elsewhere.
    TaskConfig = Annotated[Union[_configs()], Field(discriminator="name")]  # noqa: UP007


def build(config: TaskSettings) -> Task:
    """The task a configuration describes, its files read and checked.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file holds broken rows.
    """
    return importlib.import_module(f"{__name__}.{config.name}").build(config)


__all__ = [
    "Gsm8kConfig",
    "JsonlConfig",
    "PocketConfig",
    "Problem",
    "Task",
    "TaskConfig",
    "build",
]
