"""What a task is: problems, a prompt, and a check of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from azeotrope.config import Config
from azeotrope.tokens import Message


class TaskSettings(Config):
    """The base of every task's `Config`; its `name` is the literal name of the task's module."""

    name: str

    @property
    def is_local(self) -> bool:
        """Whether `build` finds all rows on this machine, without a download."""
        return True


@dataclass(frozen=True)
class Problem:
    """One question with its reference answer and, if the task has it, a worked solution."""

    dataset: str
    split: str
    row: int
    question: str
    answer: str
    solution: str

    @property
    def id(self) -> str:
        return f"{self.dataset}/{self.split}/{self.row}"


@runtime_checkable
class Task(Protocol):
    """Anything with a name, problems by split, a prompt template and an answer checker."""

    name: str
    template: str
    """Version of the prompt template; part of every trace's identity."""

    def problems(self, split: str, count: int, *, skip: int = 0) -> Sequence[Problem]: ...

    def messages(self, question: str) -> list[Message]: ...

    def extract(self, completion: str) -> str | None: ...

    def check(self, completion: str, answer: str) -> bool: ...
