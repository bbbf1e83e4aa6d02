"""What the module of a task builds on."""

from azeotrope.config import Config
from azeotrope.problems import Problem, Task

__all__ = ["Problem", "Task", "TaskSettings"]


class TaskSettings(Config):
    """The base of every task's `Config`; its `name` is the literal name of the task's module."""

    name: str

    @property
    def is_local(self) -> bool:
        """Whether `build` finds all rows on this machine, without a download."""
        return True
