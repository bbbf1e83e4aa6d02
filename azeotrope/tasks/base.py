"""What the module of a task builds on."""

import hashlib
from pathlib import Path
from typing import Any

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

    @property
    def files(self) -> tuple[Path, ...]:
        """The files on this machine whose text decides the problems; none if code decides them."""
        return ()

    def described(self) -> dict[str, Any]:
        """The settings and a hash of the files, for names of results: an edited file is another
        task.

        Raises:
            OSError: if a file cannot be read.
        """
        if not self.files:
            return self.dump()
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in self.files]
        return {**self.dump(), "content": hashes}
